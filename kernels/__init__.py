"""Triton kernels, installed as `ep_rebalance.kernels`: one operation per file.

Each file holds the public function, a torch reference with the same signature, and the kernel. The
kernels run on GPU tensors, and with TRITON_INTERPRET=1 on any; the references everywhere.
"""

import ep_rebalance.kernels.custom_ops as custom_ops

__all__ = ["custom_ops"]
