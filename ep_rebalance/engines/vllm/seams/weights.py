"""Seam: the weights of a loaded model are replaced, or written to disk.

Targets: `reload_weights`, `update_weights` and `finish_weight_update`; what discards weights, `discard`
and `sleep` above level 1; and what saves them. Why: a loader writes slot `e` with expert `e` again,
whatever the placement says, and every answer would be wrong from then on. And whoever reads saved slots
cannot know that experts moved. `expert_loads.py` knows which layers were loaded. Can go when vLLM
notifies plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ep_rebalance.engines.vllm.contract import Contract, resolve
from ep_rebalance.engines.vllm.seams.worker import WORKERS, attachment_of, worker_classes
from ep_rebalance.engines.vllm.wrapping import wrap

_RUNNERS = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
)
_SAVES = ("save_sharded_state", "save_tensorized_model")
_LEVEL_THAT_KEEPS_WEIGHTS = 1

CONTRACTS = (
    *(
        Contract(
            f"{runner}.reload_weights",
            ("weights_iterator", "weights_path", "is_checkpoint_format"),
        )
        for runner in _RUNNERS
    ),
    Contract(f"{WORKERS[0]}.update_weights", ("update_info",)),
    Contract(f"{WORKERS[0]}.finish_weight_update"),
    *(Contract(f"{WORKERS[0]}.{save}") for save in _SAVES),
    *(Contract(f"{worker}.sleep", ("level",)) for worker in WORKERS),
    *(Contract(f"{worker}.discard", ("tags",)) for worker in WORKERS),
)


def install() -> None:
    """Wrap the workers, and what runners are asked to do directly."""
    for worker in worker_classes():
        wrap(worker, "sleep", _sleep)
        wrap(worker, "discard", _discard)
        for name in ("update_weights", "finish_weight_update"):
            wrap(worker, name, _update_weights)
        for name in _SAVES:
            wrap(worker, name, _save)
    for target in _RUNNERS:
        wrap(resolve(target), "reload_weights", _reload_weights)


def _sleep(original: Callable[..., Any], worker: Any, level: int = 1) -> Any:
    _going(worker.model_runner)
    result = original(worker, level)
    # On CPU `sleep` only logs a warning (vllm/v1/worker/cpu_worker.py).
    if level > _LEVEL_THAT_KEEPS_WEIGHTS and worker.device.type != "cpu":
        _replaced(worker.model_runner)
    return result


def _discard(original: Callable[..., Any], worker: Any, tags: tuple[str, ...]) -> Any:
    _going(worker.model_runner)
    result = original(worker, tags)
    if "weights" in tags:
        _replaced(worker.model_runner)
    return result


def _update_weights(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Backends that do not load through the model are refused at start. It may be the drafter's update."""
    try:
        return original(worker, *args, **kwargs)
    finally:
        # An update that fails half way has written layers too.
        _loaded(worker.model_runner)


def _reload_weights(
    original: Callable[..., Any],
    runner: Any,
    weights_iterator: Any = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> Any:
    """Weights in the kernel's format are copied without the loader: they count as loads of all layers of the
    target, whose they are.
    """
    try:
        return original(runner, weights_iterator, weights_path, is_checkpoint_format)
    finally:
        if is_checkpoint_format:
            _loaded(runner)
        elif attachment := attachment_of(runner):
            attachment.target_replaced()


def _save(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    attachment = attachment_of(worker.model_runner)
    if attachment is not None and attachment.sessions.has_moved_experts:
        raise RuntimeError(
            "ep_rebalance: experts have moved, and whoever reads the saved slots would mix them up. "
            "Remedy: save before serving, or with mode=observe."
        )
    return original(worker, *args, **kwargs)


def _going(runner: Any) -> None:
    if attachment := attachment_of(runner):
        attachment.sessions.before_weights_go()


def _loaded(runner: Any) -> None:
    if attachment := attachment_of(runner):
        attachment.weights_loaded()


def _replaced(runner: Any) -> None:
    if attachment := attachment_of(runner):
        attachment.weights_replaced()
