"""The commands: signatures and help. Everything slow is imported inside them."""
