"""Seam: vLLM's CPU experts compute the slots of their own rank.

Target: `CPUUnquantizedExperts.apply`. Why: it ignores `expert_map` and passes ids over all ranks to a
kernel that takes them for its own (vllm/model_executor/layers/fused_moe/experts/cpu_moe.py), so that
with the engine's all-to-all a rank reads experts that it does not hold. Can go when vLLM's CPU experts
respect `expert_map`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.seams.experts import local_slots

_MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
_CLASS = "CPUUnquantizedExperts"

CONTRACTS = (
    Contract(f"{_MODULE}:{_CLASS}.apply", ("output", "topk_weights", "topk_ids", "expert_map")),
)

_ATTRIBUTE = "_ep_rebalance_local_ids"


def install() -> None:
    """On CPU, map ids to this rank's slots, except where `take_local_ids` was called."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    owner = getattr(importlib.import_module(_MODULE), _CLASS)
    original = owner.apply

    @functools.wraps(original)
    def apply(self: Any, **given: Any) -> None:
        if given["expert_map"] is None or hasattr(self, _ATTRIBUTE):
            original(self, **given)
            return
        local_MK = local_slots(given["topk_ids"], given["expert_map"])
        ids_MK, weights_MK = _without_foreign_pairs(local_MK, given["topk_weights"])
        original(self, **{**given, "topk_ids": ids_MK, "topk_weights": weights_MK})
        # A row without a slot here must add nothing, not even 0 times an output that is not finite.
        given["output"].masked_fill_((local_MK < 0).all(1, keepdim=True), 0.0)

    owner.apply = apply


def take_local_ids(experts: Any) -> None:
    """Called by our all-to-all, whose ids already are slots of this rank."""
    setattr(experts, _ATTRIBUTE, True)


def _without_foreign_pairs(
    local_MK: torch.Tensor, weights_MK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) for a kernel that computes every pair.

    local_MK: [M, K]. Slots of this rank, -1 for pairs that it must not compute.
    weights_MK: [M, K]. The router's.

    A pair of -1 gets another slot of its row and weight 0, so that it adds 0 times something that is
    computed anyway. The result of a row without any slot here is meaningless.
    """
    foreign_MK = local_MK < 0
    another_M1 = local_MK.amax(1, keepdim=True).clamp(min=0)
    return torch.where(foreign_MK, another_M1, local_MK), weights_MK.masked_fill(foreign_MK, 0.0)
