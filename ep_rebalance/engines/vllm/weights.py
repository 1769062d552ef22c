"""Seam: the weights of a loaded model are replaced.

Targets: `reload_weights`, `update_weights` and `finish_weight_update`, and what throws weights away:
`discard`, and `sleep` above level 1, which keeps them. Why: a loader writes slot `e` with expert `e`
again, whatever the placement says, and every answer would be wrong from then on. An update that leaves
the experts out must not be taken for one that wrote them: `RoutedExperts.weight_loader` tells, where
the model loads through it. Can go when vLLM tells plugins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ep_rebalance.engines.vllm.contract import Contract, resolve
from ep_rebalance.engines.vllm.worker import WORKERS, attachment_of
from ep_rebalance.engines.vllm.wrapping import wrap

logger = logging.getLogger(__name__)

_RUNNERS = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
)
_EXPERTS = "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts"

CONTRACTS = (
    *(Contract(f"{runner}.reload_weights", ("is_checkpoint_format",)) for runner in _RUNNERS),
    Contract(f"{WORKERS[0]}.update_weights", ("update_info",)),
    Contract(f"{WORKERS[0]}.finish_weight_update"),
    *(Contract(f"{worker}.sleep", ("level",)) for worker in WORKERS),
    *(Contract(f"{worker}.discard", ("tags",)) for worker in WORKERS),
    Contract(f"{_EXPERTS}.weight_loader", ("param", "loaded_weight", "expert_id")),
)

_LEVEL_THAT_KEEPS_WEIGHTS = 1
_LAYERWISE = ("nccl", "ipc")
"""Transfer backends that hand every tensor to the model's `load_weights`; others write slots themselves."""


class ExpertLoads:
    """Counts the experts' tensors that this process's models loaded through vLLM's loader."""

    def __init__(self) -> None:
        self.count = 0

    def none_since(self, count: int) -> bool:
        """Whether no expert was loaded since `count`; False if this model may load them elsewhere."""
        return 0 < count == self.count


_loads = ExpertLoads()


def install() -> None:
    """Wrap the workers, and the runners where weights reach them without the worker."""
    wrap(resolve(_EXPERTS), "weight_loader", _count_load)
    for target in WORKERS:
        worker = resolve(target)
        wrap(worker, "sleep", _sleep)
        wrap(worker, "discard", _discard)
        for name in ("update_weights", "finish_weight_update"):
            wrap(worker, name, _update_weights)
    for target in _RUNNERS:
        wrap(resolve(target), "reload_weights", _reload_weights)


def _count_load(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    _loads.count += 1
    return original(experts, *args, **kwargs)


def _sleep(original: Callable[..., Any], worker: Any, level: int = 1) -> Any:
    result = original(worker, level)
    if (
        level > _LEVEL_THAT_KEEPS_WEIGHTS and worker.device.type != "cpu"
    ):  # CPU workers do not sleep
        _replaced(worker.model_runner)
    return result


def _discard(original: Callable[..., Any], worker: Any, tags: tuple[str, ...]) -> Any:
    result = original(worker, tags)
    if "weights" in tags:
        _replaced(worker.model_runner)
    return result


def _update_weights(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the target; a drafter's experts never move. What an update that failed wrote is unknown."""
    if worker._weight_update_is_draft:
        return original(worker, *args, **kwargs)
    loads = _loads.count
    try:
        return original(worker, *args, **kwargs)
    finally:
        layerwise = worker.vllm_config.weight_transfer_config.backend in _LAYERWISE
        if not (layerwise and _loads.none_since(loads)):
            _replaced(worker.model_runner)


def _reload_weights(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    loads = _loads.count
    try:
        return original(runner, *args, **kwargs)
    finally:
        if not (kwargs.get("is_checkpoint_format", True) and _loads.none_since(loads)):
            _replaced(runner)


def _replaced(runner: Any) -> None:
    attachment = attachment_of(runner)
    if attachment is None:
        return
    try:
        attachment.weights_replaced()
    except Exception:
        logger.exception("ep_rebalance: the new weights cannot be served with what is attached")
        raise
