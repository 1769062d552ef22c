"""What a server answers over HTTP."""
