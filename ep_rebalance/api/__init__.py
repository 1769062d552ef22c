"""The server's HTTP routes, and who may use them."""
