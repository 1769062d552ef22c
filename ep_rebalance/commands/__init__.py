"""The commands of `ep-rebalance`, one module each."""
