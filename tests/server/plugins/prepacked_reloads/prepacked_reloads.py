"""A vLLM plugin that makes weights which are replaced while it serves right on CPU: vLLM 0.32 and 0.33
pack the experts for their CPU kernel when they load first, and forget to when they load again, so that
every answer is wrong from then on, with or without ep_rebalance.
"""

from __future__ import annotations

import functools
from typing import Any


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm_eplb_on_cpu import after_kernel_scan

    after_kernel_scan(_pack_again)


def _pack_again() -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    original = UnquantizedFusedMoEMethod._setup_kernel

    @functools.wraps(original)
    def set_up(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        again = self.moe_kernel is not None
        original(self, layer, *args, **kwargs)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = set_up
