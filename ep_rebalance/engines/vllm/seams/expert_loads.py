"""Seam: the MoE layers whose experts a loader writes.

Target: `RoutedExperts.weight_loader`, through which models load their experts, at start and whenever
weights are replaced: by `reload_weights`, by a transfer, or by a caller of the model's own
`load_weights`. Why: a layer whose experts are loaded again holds them in the loader's order; one that
an update leaves out keeps them where they were moved to. Can go when vLLM notifies plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ep_rebalance.engines.vllm.contract import Contract, resolve
from ep_rebalance.engines.vllm.wrapping import wrap

_EXPERTS = "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts"

CONTRACTS = (Contract(f"{_EXPERTS}.weight_loader", ("param", "loaded_weight", "expert_id")),)

_ATTRIBUTE = "ep_rebalance_loads"
_SLOTS = "ep_rebalance_loaded_slots"
_EXPERT_ID = 4
"""Where a caller of `weight_loader` that names no arguments has it."""
_all_loads = 0
"""Calls for all layers of this process. A step looks at this first: it is one comparison."""


def install() -> None:
    """Count the loader's calls for each layer."""
    wrap(resolve(_EXPERTS), "weight_loader", _count)


def _count(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    global _all_loads
    # Counted before it runs: a loader that raises may have written part of the layer.
    _all_loads += 1
    setattr(experts, _ATTRIBUTE, getattr(experts, _ATTRIBUTE, 0) + 1)
    slot = kwargs.get("expert_id", args[_EXPERT_ID] if len(args) > _EXPERT_ID else None)
    if slot is not None:
        vars(experts).setdefault(_SLOTS, set()).add(slot)
    return original(experts, *args, **kwargs)


def left_out(experts: Any, slots: Iterable[int]) -> bool:
    """Whether vLLM's loader wrote some slots of a layer and never one of these."""
    loaded = getattr(experts, _SLOTS, None)
    return loaded is not None and not loaded.issuperset(slots)


class ExpertLoads:
    """Loads of one model's MoE layers, from now on.

    complete: whether every layer has been loaded through vLLM's loader before, so that no load goes
        unseen.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._experts = [layer.routed_experts for layer in layers]
        self._seen_L = self._now_L()
        self._seen = _all_loads
        self.complete = all(self._seen_L)

    def written(self) -> tuple[int, ...]:
        """Layers that were loaded since the previous call."""
        if self._seen == _all_loads:
            return ()
        before_L, self._seen_L, self._seen = self._seen_L, self._now_L(), _all_loads
        return tuple(
            layer
            for layer, (before, now) in enumerate(zip(before_L, self._seen_L, strict=True))
            if before != now
        )

    def _now_L(self) -> list[int]:
        return [getattr(experts, _ATTRIBUTE, 0) for experts in self._experts]
