"""Seam: the life of a model runner - model loaded, inputs of a step ready, step done.

Targets: `load_model`, `_prepare_inputs` (V2 runner: `prepare_inputs`) and `eplb_step` (V2:
`EPLBController.step`). Why: vLLM calls the last once per engine step on every rank, dummy steps
included, which keeps ranks in step; the inputs tell prefill from decode tokens; and the CPU runner
never sets up balancing at all. Can go when vLLM lets a plugin bring its balancer.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.engines.vllm.attachment import Attachment
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.kernels.route_and_count import DECODE, PREFILL

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V1_CPU = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_V2_CONTROLLER = "vllm.v1.worker.gpu.eplb_utils:EPLBController"

CONTRACTS = (
    Contract(f"{_V1}.load_model"),
    Contract(f"{_V1}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")),
    Contract(f"{_V1}.eplb_step", ("is_dummy", "is_profile")),
    Contract(f"{_V1_CPU}.load_model"),
    Contract(f"{_V2}.load_model"),
    Contract(f"{_V2}.prepare_inputs", ("scheduler_output",)),
    Contract(f"{_V2_CONTROLLER}.step", ("is_dummy", "is_profile")),
)

_ATTRIBUTE = "ep_rebalance"


def attachment_of(runner: Any) -> Attachment | None:
    """What `load_model` attached to a runner."""
    return getattr(runner, _ATTRIBUTE, None)


def install() -> None:
    """Wrap the runners of both generations."""
    for target in (_V1, _V1_CPU, _V2):
        _wrap(_class(target), "load_model", _attach_after_loading)
    _wrap(_class(_V1), "_prepare_inputs", _mark_tokens_v1)
    _wrap(_class(_V2), "prepare_inputs", _mark_tokens_v2)
    _wrap(_class(_V1), "eplb_step", _step_v1)
    _wrap(_class(_V2_CONTROLLER), "step", _step_v2)


def _class(target: str) -> type[Any]:
    module, _, name = target.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def _wrap(owner: type[Any], name: str, around: Callable[..., Any]) -> None:
    original = owner.__dict__.get(name)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _attach_after_loading(
    original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any
) -> None:
    original(runner, *args, **kwargs)
    attachment = Attachment.create(runner.model, runner.vllm_config, runner.device)
    setattr(runner, _ATTRIBUTE, attachment)
    if controller := getattr(runner, "eplb", None):
        setattr(controller, _ATTRIBUTE, attachment)


def _mark_tokens_v1(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    num_scheduled_tokens: NDArray[Any],
) -> Any:
    if attachment := attachment_of(runner):
        batch, requests = runner.input_batch, len(num_scheduled_tokens)
        computed = batch.num_computed_tokens_cpu[:requests]
        in_prompt = computed < batch.num_prompt_tokens[:requests]
        attachment.begin_step(_phases(in_prompt, num_scheduled_tokens), time.perf_counter())
    return original(runner, scheduler_output, num_scheduled_tokens)


def _mark_tokens_v2(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    started = time.perf_counter()
    batch = original(runner, *args, **kwargs)
    if attachment := attachment_of(runner):
        phases_T = _phases(batch.is_prefilling_np, batch.num_scheduled_tokens)
        attachment.begin_step(phases_T[: batch.num_tokens], started)
    return batch


def _phases(in_prompt: NDArray[Any], num_tokens: NDArray[Any]) -> NDArray[np.int64]:
    return np.repeat(np.where(in_prompt, PREFILL, DECODE), num_tokens).astype(np.int64)


def _step_v1(
    original: Callable[..., Any], runner: Any, is_dummy: bool = False, is_profile: bool = False
) -> None:
    attachment = attachment_of(runner)
    if attachment is not None and not is_profile:
        attachment.end_step()


def _step_v2(
    original: Callable[..., Any], controller: Any, is_dummy: bool = False, is_profile: bool = False
) -> None:
    _step_v1(original, controller, is_dummy, is_profile)
