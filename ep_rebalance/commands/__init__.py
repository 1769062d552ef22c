"""The command `ep-rebalance`: `app`, and its commands, one module each."""
