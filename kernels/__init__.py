"""Triton kernels, installed as `ep_rebalance.kernels`: one operation per file.

Each file holds the public function, a torch reference with the same signature, the operation of
`torch.library` that torch.compile passes through (`torch.ops.ep_rebalance.*`), and the kernel. Kernels run
on GPU tensors, and with TRITON_INTERPRET=1 on any; the references everywhere.
"""
