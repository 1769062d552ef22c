"""A vLLM plugin for routers that score experts by a sigmoid and have no groups, as MiniMax-M2's: vLLM's
router for CPU asserts that there are none. It has what they compute, though: grouped routing with one group.
"""

from __future__ import annotations

import functools
from typing import Any


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm_eplb_on_cpu import after_kernel_scan

    after_kernel_scan(_take_one_group)


def _take_one_group() -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    original = CPURouter.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        scored = self.scoring_func == "sigmoid" and self.custom_routing_function is None
        if scored and not self.use_grouped_topk:
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    CPURouter.__init__ = init
