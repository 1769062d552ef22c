"""Seam: the start of a worker - device ready, model loaded.

Targets: `init_device` and `load_model`. Why the worker and not its model runner: vLLM loads the model
inside a memory pool whose contents level-2 sleep discards
(vllm/device_allocator/sleep_mode_backend.py); our tables and buffers must outlive it, so they are made
after `load_model` has left the pool. Can go when vLLM notifies plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ep_rebalance.engines.port import compile_in_background
from ep_rebalance.engines.vllm import expert_proof
from ep_rebalance.engines.vllm.contract import Contract, may_import, resolve
from ep_rebalance.engines.vllm.engine_config import active_config
from ep_rebalance.engines.vllm.parallel import ep_group
from ep_rebalance.engines.vllm.seams.activation import complete
from ep_rebalance.engines.vllm.seams.attachment import Attachment
from ep_rebalance.engines.vllm.seams.rank_agreement import agree, default_store
from ep_rebalance.engines.vllm.wrapping import wrap

WORKERS = ("vllm.v1.worker.gpu_worker:Worker", "vllm.v1.worker.cpu_worker:CPUWorker")

CONTRACTS = (
    *(Contract(f"{worker}.init_device") for worker in WORKERS),
    Contract(f"{WORKERS[0]}.load_model"),
    *(Contract(f"{worker}.compile_or_warm_up_model") for worker in WORKERS),
    Contract("vllm.utils.mem_utils:DeviceMemoryProfiler"),
    *expert_proof.CONTRACTS,
)

_ATTRIBUTE = "ep_rebalance"
_AGREED = "ep_rebalance_agreed"


def attachment_of(holder: Any) -> Attachment | None:
    """What was attached to a model runner, or to a V2 runner's `EPLBController`; None if nothing was."""
    return getattr(holder, _ATTRIBUTE, None)


def worker_classes() -> list[type[Any]]:
    """vLLM's workers for this platform."""
    return [resolve(target) for target in WORKERS if may_import(target)]


def install() -> None:
    """Wrap the workers."""
    for worker in worker_classes():
        wrap(worker, "init_device", _agree_when_ready)
        wrap(worker, "compile_or_warm_up_model", _warm_up)
    wrap(resolve(WORKERS[0]), "load_model", _attach_after_loading)


def _agree_when_ready(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> None:
    original(worker, *args, **kwargs)
    _agree(worker)


def _agree(worker: Any) -> None:
    """Adopt rank 0's settings, once."""
    if getattr(worker, _AGREED, False):
        return
    config = agree(active_config(worker.vllm_config), ep_group().ranks, default_store())
    complete(worker.vllm_config, config)
    if worker.local_rank == 0:  # about once for all workers that share numba's cache on disk
        compile_in_background()
    setattr(worker, _AGREED, True)


def _warm_up(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Keeps warm-up steps out: V2 warms its kernels up with requests like those of users, and vLLM 0.32
    does not yet suppress its balancer meanwhile.
    """
    controller = getattr(worker.model_runner, "eplb", None)
    if controller is None:
        return original(worker, *args, **kwargs)
    before, controller.suppressed = controller.suppressed, True
    try:
        return original(worker, *args, **kwargs)
    finally:
        controller.suppressed = before


def _attach_after_loading(
    original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.utils.mem_utils import DeviceMemoryProfiler

    # A platform's own subclass of vLLM's worker may override `init_device`, which is then not wrapped.
    _agree(worker)
    original(worker, *args, **kwargs)
    runner = worker.model_runner
    with DeviceMemoryProfiler() as used, set_current_vllm_config(worker.vllm_config):
        attachment = Attachment.create(runner, worker.vllm_config, runner.device)
    # Counted with the weights, so that vLLM does not give our memory to the KV cache. V1 on CPU does
    # not count them.
    if hasattr(runner, "model_memory_usage"):
        runner.model_memory_usage += used.consumed_memory
    if attachment is None:
        return
    setattr(runner, _ATTRIBUTE, attachment)
    if controller := getattr(runner, "eplb", None):
        setattr(controller, _ATTRIBUTE, attachment)
