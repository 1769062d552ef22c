"""Triton kernels, installed as `ep_rebalance.kernels`."""
