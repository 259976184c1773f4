"""The `alto` command: signatures in `commands`, everything slow imported only when a command runs."""
