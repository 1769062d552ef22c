"""Which slot a token goes to."""
