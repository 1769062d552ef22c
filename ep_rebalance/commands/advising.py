"""What `ep-rebalance advise` does: replays options over the recorded load, and ranks them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ep_rebalance.commands.advice_inputs import named_hardware, with_expert_size
from ep_rebalance.commands.advice_result import AdviceResult
from ep_rebalance.commands.scenarios import explained, settings_for
from ep_rebalance.commands.side_by_side import replay_all
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import TraceHead, TraceReader, read_records
from ep_rebalance.offline import statements
from ep_rebalance.offline.advice import (
    Advice,
    advise_cut_experts,
    advise_expert_parallel,
    ranked,
)
from ep_rebalance.offline.recording import Recording, sum_up
from ep_rebalance.offline.room import room_on
from ep_rebalance.offline.run import Replayed, Scenario
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.offline.statements import Statement
from ep_rebalance.offline.step_time import Hardware, ModelledSteps

_POLICIES = ("ours", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviseOptions:
    """What the options of `ep-rebalance advise` say; `advise.py` explains them."""

    traces: Sequence[Path]
    hardware: str | None
    measure: bool
    model: str | None
    expert_bytes: int | None
    hidden_size: int | None
    gpus: Sequence[int]
    redundant: Sequence[int]
    memory: float | None
    gpus_per_node: int
    tokens_per_gpu: float | None
    config: Path | None
    jobs: int | None
    as_json: bool
    quiet: bool


def advise(options: AdviseOptions) -> None:
    """Print the answers and the ranking, as JSON or tables. Exits with 2 for what the user can put right."""
    with explained():
        readers = open_traces(options.traces)
        settings = settings_for(readers[0], options.config, [])
        head, size = with_expert_size(
            readers[0].head,
            settings,
            options.model,
            options.expert_bytes,
            options.hidden_size,
        )
        figures = named_hardware(
            options.hardware,
            options.measure,
            needs_nodes=max(options.gpus) > options.gpus_per_node,
        )
        load = _Load(
            head=head,
            settings=settings,
            recording=sum_up(read_records(readers)),
            tokens_per_gpu=options.tokens_per_gpu,
            bytes_per_parameter=size.bytes_per_parameter,
        )
        machine = _Machine(
            hardware=figures.figures,
            gpus_per_node=options.gpus_per_node,
            memory_bytes=options.memory * 1e9 if options.memory else figures.figures.memory_bytes,
        )
        pairs = _pairs(load, machine, options.gpus, options.redundant)
        every = [one for pair in pairs for one in pair]
        replayed = replay_all(readers, every, head=head, jobs=options.jobs, quiet=options.quiet)
        best = ranked(_options(load, machine, replayed))
        result = AdviceResult(
            head=head,
            settings=settings,
            size=size,
            hardware=figures,
            statements=list(_statements(load, machine, readers, replayed, best)),
            best=best,
        )
    if options.as_json or not sys.stdout.isatty():
        print(json.dumps(result.as_json(), indent=2))
    else:
        result.print()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What is to be served.

    tokens_per_gpu: tokens of a step on each GPU; None for as many as each recorded rank had.
    """

    head: TraceHead
    settings: RebalanceConfig
    recording: Recording
    tokens_per_gpu: float | None
    bytes_per_parameter: float

    def factor(self, ranks: int) -> float:
        """Tokens of a step on that many ranks, divided by those of a recorded step."""
        head, mean = self.head, self.recording.mean
        recorded = float(mean.counts_ALE.sum()) / (head.layers * head.top_k * mean.steps)
        return (self.tokens_per_gpu or recorded / head.ep_size) * ranks / recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """What it is to be served on.

    memory_bytes: bytes. The memory of a GPU.
    """

    hardware: Hardware
    gpus_per_node: int
    memory_bytes: float


def _pairs(
    load: _Load, machine: _Machine, gpus: Sequence[int], redundant: Sequence[int]
) -> list[tuple[Scenario, Scenario]]:
    """(ours, none) for each size that is possible. Raises ValueError if none is."""
    pairs = []
    for ranks, extra in product(gpus, redundant):
        copies = _slots(load.head, ranks, extra)
        if copies is not None:
            ours, none = (_scenario(load, machine, policy, ranks, copies) for policy in _POLICIES)
            pairs.append((ours, none))
    if not pairs:
        raise ValueError(f"{load.head.experts} experts cannot be shared by that many GPUs")
    return pairs


def _scenario(load: _Load, machine: _Machine, policy: str, ranks: int, copies: int) -> Scenario:
    one = scenario(
        load.head,
        load.settings,
        policy,
        ranks,
        copies,
        machine.gpus_per_node,
        machine.hardware,
        bytes_per_parameter=load.bytes_per_parameter,
    )
    assert isinstance(one.step_time, ModelledSteps)
    return replace(one, step_time=replace(one.step_time, load_factor=load.factor(ranks)))


def _options(load: _Load, machine: _Machine, replayed: Sequence[Replayed]) -> list[Advice]:
    """The expert-parallel options, and for each number of GPUs one with every expert cut over all GPUs.

    replayed: ours and none in turn, as in `_pairs`.
    """
    head, mean, memory = load.head, load.recording.mean, machine.memory_bytes
    parallel = [
        advise_expert_parallel(head, mean, ours, none, memory)
        for ours, none in zip(replayed[::2], replayed[1::2], strict=True)
    ]
    each = {one.scenario.topology.num_ranks: one.scenario for one in replayed[::2]}
    return parallel + [advise_cut_experts(head, mean, one, memory) for one in each.values()]


def _slots(head: TraceHead, ranks: int, extra: int) -> int | None:
    """Redundant experts if each rank has `extra` more slots than it needs; None if that is impossible."""
    slots = -(-head.experts // ranks) + extra
    return None if slots > head.experts else slots * ranks - head.experts


def _statements(
    load: _Load,
    machine: _Machine,
    readers: Sequence[TraceReader],
    replayed: Sequence[Replayed],
    best: Sequence[Advice],
) -> Iterator[Statement]:
    """The answers for the best expert-parallel option.

    replayed: ours and none in turn, as in `_pairs`.
    """
    chosen = next(option for option in best if option.expert_parallel)
    ours, none = next(
        pair
        for pair in zip(replayed[::2], replayed[1::2], strict=True)
        if pair[0].scenario.topology.num_ranks == chosen.ranks
        and pair[0].scenario.config.planner.redundant_experts == chosen.redundant
    )
    topology = ours.scenario.topology
    room = room_on(load.head, load.recording, topology)
    yield statements.about_imbalance(room)
    if len(load.recording.phases) > 1:
        for phase in load.recording.phases:
            yield statements.about_imbalance(
                room_on(load.head, load.recording, topology, phase, in_parts=False)
            )
    yield statements.about_persistence(room)
    yield statements.about_hot_experts(load.head, room)
    same = [option for option in best if option.expert_parallel and option.ranks == chosen.ranks]
    yield from statements.about_redundancy(load.head, same)
    yield statements.about_cold_start(ours)
    yield statements.about_vllm_eplb(ours, none, _replayed_eplb(load, machine, readers, chosen))
    yield statements.about_expert_parallel(best, room, ours)


def _replayed_eplb(
    load: _Load, machine: _Machine, readers: Sequence[TraceReader], chosen: Advice
) -> Replayed | str:
    """A replay of vLLM's balancer on the same ranks with as many redundant experts, or why there is none."""
    try:
        one = _scenario(load, machine, "vllm-eplb", chosen.ranks, chosen.redundant)
    except ValueError as error:
        return str(error)
    (replayed,) = replay_all(readers, [one], head=load.head, quiet=True)
    return replayed
