"""In the worker: what vLLM's own balancer lacks on CPU, and what a benchmark reads from it.

vLLM imports this module in a worker because `--worker-extension-cls` names it, before the model
runner is built.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from vllm.distributed.eplb import eplb_state
from vllm.distributed.eplb.policy import DefaultEplbPolicy
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.engines.vllm.seams.prepare_finalize import AllToAllPrepareAndFinalize, rebind

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


class Record:
    """What was seen of this worker's balancer.

    rearrangements: `seconds` that the engine stood still, `moved` slots that hold another expert
    than before, `fetched` those of them whose rank did not hold that expert, and max/mean rank load
    per layer on the balancer's own window, `before` and `after`.
    """

    def __init__(self) -> None:
        self.step_times: list[tuple[float, float, bool]] = []
        self.rearrangements: list[dict[str, Any]] = []
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
    token = torch.arange(len(ids)).unsqueeze(1)
    replica = ((token * KNUTH_MULTIPLIER) & 0xFFFFFFFF) % logical_replica_count[ids].clamp(min=1)
    slots = logical_to_physical_map[ids, replica]
    if record_enabled:
        counted = slots if num_unpadded_tokens is None else slots[: int(num_unpadded_tokens)]
        load = torch.bincount(counted.flatten(), minlength=len(expert_load_view))
        expert_load_view += load.to(expert_load_view.dtype)
    return slots.to(topk_ids.dtype)


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
    rearrange = eplb_state.EplbState.rearrange
    rebalance = DefaultEplbPolicy.rebalance_experts.__func__

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
                "moved": int((old_LP != new_LP).sum()),
                "fetched": _fetched(old_LP, new_LP, ranks),
                "before": _imbalance_L(load_LE, old_LP, ranks),
                "after": _imbalance_L(load_LE, new_LP, ranks),
            }
        )
        return new_LP

    eplb_state.EplbState.rearrange = timed_rearrange
    DefaultEplbPolicy.rebalance_experts = classmethod(watched_rebalance)


def _fetched(old_LP: torch.Tensor, new_LP: torch.Tensor, ranks: int) -> int:
    """Slots whose rank must get the expert from another one."""
    layers = len(old_LP)
    old_LRS, new_LRS = old_LP.view(layers, ranks, 1, -1), new_LP.view(layers, ranks, -1, 1)
    return int((~(new_LRS == old_LRS).any(-1)).sum())


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
