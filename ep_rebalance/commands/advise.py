"""`ep-rebalance advise`: how to serve the recorded load."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.advice_inputs import named_hardware, with_expert_size
from ep_rebalance.commands.advice_result import AdviceResult
from ep_rebalance.commands.options import (
    AsJson,
    ExpertBytes,
    HiddenSize,
    OptionalTraces,
    Quiet,
    RecordedModel,
)
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
from ep_rebalance.offline.step_time import (
    Hardware,
    ModelledSteps,
    hardware_names,
)

_DEFAULT_GPUS = (8, 16, 32)
_DEFAULT_REDUNDANT = (0, 1, 2)
_POLICIES = ("ours", "none")

_Hardware = Annotated[
    str | None,
    typer.Option(
        help=f"Accelerator: {', '.join(hardware_names())}, or a YAML file of its figures.",
        show_default="none; required without --measure",
    ),
]
_Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Measure this machine instead: memory bandwidth, a matrix product, links. What cannot be "
        "measured here is taken from --hardware.",
    ),
]
_Gpus = Annotated[
    list[int] | None,
    typer.Option(
        min=2, help="GPUs. Repeat for several.", show_default=", ".join(map(str, _DEFAULT_GPUS))
    ),
]
_Redundant = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        help="Redundant experts on each GPU. Repeat for several.",
        show_default=", ".join(map(str, _DEFAULT_REDUNDANT)),
    ),
]
_Memory = Annotated[
    float | None, typer.Option(min=1, help="Memory of a GPU in GB.", show_default="the hardware's")
]
_GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs on a node.")]
_TokensPerGpu = Annotated[
    float | None,
    typer.Option(min=1, help="Tokens of a step on each GPU.", show_default="as recorded"),
]
_Config = Annotated[
    Path | None, typer.Option(help="Settings of the plugin.", show_default="the recorded server's")
]
_Jobs = Annotated[int | None, typer.Option(min=1, help="Replays to run at the same time.")]


def advise(
    traces: OptionalTraces = None,
    hardware: _Hardware = None,
    measure: _Measure = False,
    model: RecordedModel = None,
    expert_bytes: ExpertBytes = None,
    hidden_size: HiddenSize = None,
    gpus: _Gpus = None,
    redundant: _Redundant = None,
    memory: _Memory = None,
    gpus_per_node: _GpusPerNode = 8,
    tokens_per_gpu: _TokensPerGpu = None,
    config: _Config = None,
    jobs: _Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Is there anything to gain from moving experts, and how should this load be served?

      ep-rebalance advise load.eptrace --hardware h100-sxm --gpus 8 --gpus 16

    Says first whether ranks are uneven and whether that lasts, then ranks numbers of GPUs and of redundant
    experts, and experts cut over all GPUs. Each answer says how it was come by. Step times are modelled from
    the hardware's figures, not measured: trust the ranking more than the numbers.
    """
    with explained():
        readers = open_traces(traces or [])
        settings = settings_for(readers[0].head, config, [])
        sizes = gpus or _DEFAULT_GPUS
        head, size = with_expert_size(readers[0].head, settings, model, expert_bytes, hidden_size)
        figures = named_hardware(hardware, measure, needs_nodes=max(sizes) > gpus_per_node)
        load = _Load(
            head=head,
            settings=settings,
            recording=sum_up(read_records(readers)),
            tokens_per_gpu=tokens_per_gpu,
            bytes_per_parameter=size.bytes_per_parameter,
        )
        machine = _Machine(
            hardware=figures.figures,
            gpus_per_node=gpus_per_node,
            memory_bytes=memory * 1e9 if memory else figures.figures.memory_bytes,
        )
        pairs = _pairs(load, machine, sizes, redundant or _DEFAULT_REDUNDANT)
        every = [one for pair in pairs for one in pair]
        replayed = replay_all(readers, every, head=head, jobs=jobs, quiet=quiet)
        best = ranked(_options(load, machine, replayed))
        result = AdviceResult(
            head=head,
            settings=settings,
            size=size,
            hardware=figures,
            statements=list(_statements(load, machine, readers, replayed, best)),
            best=best,
        )
    if as_json or not sys.stdout.isatty():
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
