"""In the worker: what vLLM's own balancer lacks on CPU, and what a benchmark reads from it.

vLLM imports this module in a worker because `--worker-extension-cls` names it, before the model
runner is built.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.eplb import eplb_state
from vllm.distributed.eplb.policy import DefaultEplbPolicy
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.engines.vllm.seams.prepare_finalize import AllToAllPrepareAndFinalize, rebind
from vllm_eplb_on_cpu import STEPS_FOLDER

KNUTH_MULTIPLIER = 2654435769
"""Of vLLM's kernel, which spreads a token's copies over replicas by a hash of its position."""


class WorkerExtension:
    """Methods for `collective_rpc`."""

    def ep_rebalance_step_times(self) -> list[tuple[float, float, bool]]:
        """When this rank's steps since the last call began and ended, and whether experts moved."""
        taken, RECORD.step_times[:] = list(RECORD.step_times), []
        return taken

    def vllm_eplb_rearrangements(self) -> list[dict[str, Any]]:
        """All rearrangements since the start."""
        return list(RECORD.rearrangements)

    def vllm_eplb_steps(self) -> None:
        """Write all steps since the start to a file of this rank in STEPS_FOLDER: `counts_NLE`, tokens of
        each expert, this rank's; `dummy_N`; and the maps `slots_NLP` after each step."""
        rank = eplb_state.get_ep_group().rank_in_group
        counts, dummies, maps = zip(*RECORD.steps, strict=True)
        np.savez(
            Path(os.environ[STEPS_FOLDER]) / f"rank{rank}.npz",
            counts_NLE=np.stack(counts),
            dummy_N=np.array(dummies),
            slots_NLP=np.stack(maps),
        )


class Record:
    """What was seen of this worker's balancer.

    steps: counts [L, E], whether it was a dummy, map [L, P] after it; of each step, if they are kept.
    counted_LE: of the step that is running.
    rearrangements: the `step` that each followed, `seconds` that the engine stood still, `moved` slots
    that hold another expert than before, `fetched` experts that a rank got from another, and max/mean
    rank load per layer on the balancer's own window, `before` and `after`.
    """

    def __init__(self) -> None:
        self.step_times: list[tuple[float, float, bool]] = []
        self.rearrangements: list[dict[str, Any]] = []
        self.steps: list[tuple[np.ndarray, bool, np.ndarray]] = []
        self.steps_taken = 0
        self.counted_LE: torch.Tensor | None = None
        self.started: float | None = None
        self.rearranged = False
        self.ranks = 1


RECORD = Record()


class HostEvent:
    """Stands in for `torch.Event`, which needs an accelerator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds."""
        return 1e3 * (later._time - self._time)


class HostStream:
    """Stands in for an accelerator's stream: on CPU all work is done when the call returns."""

    def synchronize(self) -> None: ...


def map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """What vLLM's Triton kernel does: slots for logical ids, and a count per slot."""
    ids = topk_ids.long()
    if STEPS_FOLDER in os.environ:
        _count_experts(ids, expert_load_view, len(logical_replica_count), num_unpadded_tokens)
    token = torch.arange(len(ids)).unsqueeze(1)
    replica = ((token * KNUTH_MULTIPLIER) & 0xFFFFFFFF) % logical_replica_count[ids].clamp(min=1)
    slots = logical_to_physical_map[ids, replica]
    if record_enabled:
        counted = slots if num_unpadded_tokens is None else slots[: int(num_unpadded_tokens)]
        load = torch.bincount(counted.flatten(), minlength=len(expert_load_view))
        expert_load_view += load.to(expert_load_view.dtype)
    return slots.to(topk_ids.dtype)


def _count_experts(
    ids: torch.Tensor, expert_load_view: torch.Tensor, experts: int, tokens: torch.Tensor | None
) -> None:
    """Count logical ids, also in steps that the balancer does not record."""
    slots = len(expert_load_view)
    layer = expert_load_view.storage_offset() // slots
    if RECORD.counted_LE is None:
        layers = expert_load_view.untyped_storage().nbytes() // expert_load_view.itemsize // slots
        RECORD.counted_LE = torch.zeros(layers, experts, dtype=torch.int64)
    counted = ids if tokens is None else ids[: int(tokens)]
    RECORD.counted_LE[layer] += torch.bincount(counted.flatten(), minlength=experts)


def _install() -> None:
    torch.Event = HostEvent
    torch.accelerator.current_stream = lambda *args: HostStream()
    base_router.eplb_map_to_physical_and_record = map_to_physical_and_record
    _carry_tokens_by_all_to_all()
    _balance_after_loading()
    _time_steps()
    _watch_rearrangements()


def _carry_tokens_by_all_to_all() -> None:
    """CPU has no all-to-all backend of vLLM's own."""

    def make(moe: Any, *args: Any, **kwargs: Any) -> AllToAllPrepareAndFinalize:
        return AllToAllPrepareAndFinalize(moe, RebalanceConfig())

    rebind(make)


def _balance_after_loading() -> None:
    """The CPU runner never sets its balancer up; this is what the GPU runner does after loading."""
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    original = CPUModelRunner.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._moe_model = get_mixture_of_experts_model(self.model)
        state = eplb_state.EplbState(self.parallel_config, self.device)
        state.add_model(self._moe_model, self.model_config)
        self.eplb_state = state

    CPUModelRunner.load_model = load_model


def _time_steps() -> None:
    """From a step's inputs to the end of the balancer's part, as ep_rebalance times its own."""
    prepare, eplb_step = GPUModelRunner._prepare_inputs, GPUModelRunner.eplb_step

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        RECORD.started = time.perf_counter()
        return prepare(self, *args, **kwargs)

    @functools.wraps(eplb_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        RECORD.rearranged = False
        eplb_step(self, *args, **kwargs)
        started, RECORD.started = RECORD.started, None
        if started is not None:
            RECORD.step_times.append((started, time.perf_counter(), RECORD.rearranged))

    GPUModelRunner._prepare_inputs = prepare_inputs
    GPUModelRunner.eplb_step = step


def _watch_rearrangements() -> None:
    step = eplb_state.EplbState.step
    rearrange = eplb_state.EplbState.rearrange
    rebalance = DefaultEplbPolicy.rebalance_experts.__func__

    @functools.wraps(step)
    def numbered_step(
        self: Any, is_dummy: bool = False, is_profile: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        RECORD.steps_taken += not is_profile
        step(self, is_dummy, is_profile, *args, **kwargs)
        if STEPS_FOLDER in os.environ and not is_profile:
            (state,) = self.model_states.values()
            counted_LE = RECORD.counted_LE
            if counted_LE is None:
                counted_LE = torch.zeros_like(state.logical_replica_count)
            if is_dummy:
                counted_LE.zero_()
            slots_LP = state.physical_to_logical_map.numpy().copy()
            RECORD.steps.append((counted_LE.numpy().copy(), is_dummy, slots_LP))
        RECORD.counted_LE = None

    @functools.wraps(rearrange)
    def timed_rearrange(self: Any, is_profile: bool = False, *args: Any, **kwargs: Any) -> Any:
        began, seen = time.perf_counter(), len(RECORD.rearrangements)
        result = rearrange(self, is_profile, *args, **kwargs)
        if is_profile:
            del RECORD.rearrangements[seen:]
            return result
        RECORD.rearranged = True
        for entry in RECORD.rearrangements[seen:]:
            entry["seconds"] = time.perf_counter() - began
        return result

    @functools.wraps(rebalance)
    def watched_rebalance(
        cls: Any,
        load_LE: torch.Tensor,
        slots: int,
        groups: int,
        nodes: int,
        ranks: int,
        old_LP: Any,
    ) -> Any:
        new_LP = rebalance(cls, load_LE, slots, groups, nodes, ranks, old_LP)
        RECORD.rearrangements.append(
            {
                "step": RECORD.steps_taken,
                "moved": int((old_LP != new_LP).sum()),
                "fetched": _fetched(old_LP, new_LP, ranks),
                "before": _imbalance_L(load_LE, old_LP, ranks),
                "after": _imbalance_L(load_LE, new_LP, ranks),
            }
        )
        return new_LP

    eplb_state.EplbState.step = numbered_step
    eplb_state.EplbState.rearrange = timed_rearrange
    DefaultEplbPolicy.rebalance_experts = classmethod(watched_rebalance)


def _fetched(old_LP: torch.Tensor, new_LP: torch.Tensor, ranks: int) -> int:
    """How often a rank must get an expert from another one: once, also if it is to hold it twice."""
    old_LRE, new_LRE = (_held_LRE(slots_LP.long(), ranks) for slots_LP in (old_LP, new_LP))
    return int((new_LRE & ~old_LRE).sum())


def _held_LRE(slots_LP: torch.Tensor, ranks: int) -> torch.Tensor:
    """Which experts each rank holds. There are no more experts than slots."""
    layers, slots = slots_LP.shape
    held_LRE = torch.zeros(layers, ranks, slots, dtype=torch.bool)
    return held_LRE.scatter_(2, slots_LP.view(layers, ranks, -1), True)


def _imbalance_L(load_LE: torch.Tensor, slots_LP: torch.Tensor, ranks: int) -> list[float]:
    """max/mean rank load per layer, with an expert's load spread evenly over its replicas."""
    slots_LP, load_LE = slots_LP.long(), load_LE.double()
    replicas_LE = torch.zeros_like(load_LE).scatter_add_(
        1, slots_LP, torch.ones_like(slots_LP, dtype=load_LE.dtype)
    )
    load_LP = (load_LE / replicas_LE.clamp(min=1)).gather(1, slots_LP)
    rank_load_LR = load_LP.view(len(load_LP), ranks, -1).sum(-1)
    imbalance_L: list[float] = (
        rank_load_LR.amax(1) / rank_load_LR.mean(1).clamp(min=1e-9)
    ).tolist()
    return imbalance_L


_install()
