"""Seam: the steps of a model runner - inputs of a step ready, step done.

Targets: `_prepare_inputs` (V2 runner: `prepare_inputs`), and `eplb_step` (V2: `EPLBController.step`).
Why: vLLM calls the latter once per engine step on every rank, dummy steps included, which keeps ranks
in step; the inputs distinguish prefill from decode tokens. Can go when vLLM lets a plugin bring its own
balancer.

V1 calls `eplb_step` before it issues the copy of the sampled tokens to the host, which would then wait
for a round of ours. So a busy step of V1 ends when `sample_tokens` returns; one of a pooling model, which
never samples and calls `eplb_step`, when `execute_model` does: `_pool` runs in the last pipeline stage only.
Only dummy steps end in `eplb_step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.engines.port import DECODE, PREFILL
from ep_rebalance.engines.vllm.contract import Contract, resolve
from ep_rebalance.engines.vllm.seams.worker import attachment_of
from ep_rebalance.engines.vllm.wrapping import wrap

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_V2_CONTROLLER = "vllm.v1.worker.gpu.eplb_utils:EPLBController"

CONTRACTS = (
    Contract(f"{_V1}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")),
    Contract(f"{_V1}.eplb_step", ("is_dummy", "is_profile")),
    Contract(f"{_V1}.sample_tokens"),
    Contract(f"{_V1}.execute_model"),
    Contract(f"{_V2}.prepare_inputs", ("scheduler_output",)),
    Contract(f"{_V2_CONTROLLER}.step", ("is_dummy", "is_profile")),
)


def install() -> None:
    """Wrap the runners of both generations."""
    wrap(resolve(_V1), "_prepare_inputs", _mark_tokens_v1)
    wrap(resolve(_V2), "prepare_inputs", _mark_tokens_v2)
    wrap(resolve(_V1), "eplb_step", _step_v1)
    wrap(resolve(_V1), "sample_tokens", _end_busy_step_v1)
    wrap(resolve(_V1), "execute_model", _end_pooling_step_v1)
    wrap(resolve(_V2_CONTROLLER), "step", _step_v2)


def _mark_tokens_v1(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    num_scheduled_tokens: NDArray[Any],
) -> Any:
    if attachment := attachment_of(runner):
        batch, requests = runner.input_batch, len(num_scheduled_tokens)
        # A token is prefill while its request's prompt is not computed whole.
        computed = batch.num_computed_tokens_cpu[:requests]
        in_prompt = computed < batch.num_prompt_tokens[:requests]
        attachment.begin_step(
            _phases(in_prompt, num_scheduled_tokens),
            num_scheduled_tokens,
            started=time.perf_counter(),
            continues=_continues(scheduler_output),
        )
    return original(runner, scheduler_output, num_scheduled_tokens)


def _mark_tokens_v2(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    started = time.perf_counter()
    batch = original(runner, scheduler_output, *args, **kwargs)
    attachment = attachment_of(runner)
    if attachment is not None and not runner.eplb.suppressed:
        phases_T = _phases(batch.is_prefilling_np, batch.num_scheduled_tokens)
        # With adaptive verification of drafts a batch has fewer tokens than were scheduled
        # (vllm/v1/worker/gpu/input_batch.py).
        attachment.begin_step(
            phases_T[: batch.num_tokens],
            batch.num_scheduled_tokens,
            started=started,
            continues=_continues(scheduler_output),
        )
    return batch


def _phases(in_prompt: NDArray[Any], num_tokens: NDArray[Any]) -> NDArray[np.int8]:
    return np.repeat(np.where(in_prompt, PREFILL, DECODE).astype(np.int8), num_tokens)


def _continues(scheduler_output: Any) -> bool:
    """Whether some request was scheduled before: then the engine has had work since its last step."""
    return bool(scheduler_output.scheduled_cached_reqs.req_ids)


def _step_v1(
    original: Callable[..., Any], runner: Any, is_dummy: bool = False, is_profile: bool = False
) -> None:
    attachment = attachment_of(runner)
    if attachment is not None and is_dummy and not is_profile:
        attachment.sessions.end_step()


def _end_busy_step_v1(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(runner, *args, **kwargs)
    attachment = attachment_of(runner)
    if attachment is not None and attachment.sessions.busy:
        attachment.sessions.end_step()
    return output


def _end_pooling_step_v1(
    original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any
) -> Any:
    if runner.is_pooling_model:
        return _end_busy_step_v1(original, runner, *args, **kwargs)
    return original(runner, *args, **kwargs)


def _step_v2(
    original: Callable[..., Any], controller: Any, is_dummy: bool = False, is_profile: bool = False
) -> None:
    """Leaves out steps that warm kernels up, in which vLLM suppresses its own balancer too."""
    attachment = attachment_of(controller)
    if attachment is not None and not is_profile and not controller.suppressed:
        attachment.sessions.end_step()
