"""Triton kernels, installed as `ep_rebalance.kernels`: one operation per file.

Each file holds the public function, a torch reference with the same signature, the `torch.library`
operation that torch.compile passes through (`torch.ops.ep_rebalance.*`), and the kernel. Kernels run on
GPU tensors, and on any tensors with TRITON_INTERPRET=1; the references run everywhere. The operation of
`route_by_own_counts` is in ep_rebalance/routing/route.py, which also knows its form for the host.

Letters: `M` rows, `H` hidden size, `I` intermediate size, `N` (token, expert) pairs, `S` slots of this
rank, `B` blocks, `R` rows of a block; others as in `ep_rebalance/placement.py`.
"""
