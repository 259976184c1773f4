"""What a person sees of a search: its story (`story`), live (`live_table`), as lines (`plain_lines`), at the end."""
