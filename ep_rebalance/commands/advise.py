"""`ep-rebalance advise`: how to serve the recorded load."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ep_rebalance.commands.options import AsJson, Quiet, Traces
from ep_rebalance.commands.replay_result import SCHEMA_VERSION
from ep_rebalance.commands.scenarios import explained, settings_for
from ep_rebalance.commands.side_by_side import replay_all
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import RecordedSnapshot, TraceHead, TraceReader, read_records
from ep_rebalance.offline.advice import (
    Advice,
    advise_cut_experts,
    advise_expert_parallel,
    mean_snapshot,
    ranked,
)
from ep_rebalance.offline.model_shape import completed
from ep_rebalance.offline.run import NothingRecorded, Replayed, Scenario
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.offline.step_time import ModelledSteps, hardware_names, load_hardware
from ep_rebalance.version import __version__

_DEFAULT_GPUS = (8, 16, 32)
_DEFAULT_REDUNDANT = (0, 1, 2)
_POLICIES = ("ours", "none")
_GROUP = 256
"""How many snapshots are held in memory before they are summed up."""


_METHOD = (
    "home: (token, expert) pairs that stay on their GPU. decode, prefill: how much longer the experts take "
    "than with no copies, for the tokens of that phase alone, spread over all recorded steps. Modelled: the "
    "bytes of the experts that get tokens over the memory's bandwidth, or the operations over the peak, "
    "whichever takes longer. Where decode is above 0, a server that mostly decodes wants fewer copies."
)

_Hardware = Annotated[
    str,
    typer.Option(
        help=f"Accelerator: {', '.join(hardware_names())}, or a YAML file of its figures."
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
    traces: Traces,
    hardware: _Hardware,
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
    """Is expert parallelism worth it for this load, on how many GPUs, with how many redundant experts?

      ep-rebalance advise load.eptrace --hardware h100-sxm --gpus 8 --gpus 16

    Step times are modelled from the hardware's figures, not measured: trust the ranking more than the
    numbers.
    """
    with explained():
        readers = open_traces(traces)
        head = completed(readers[0].head)
        load = _Load(
            head=head,
            settings=settings_for(head, config, []),
            mean=_summed(head, readers),
            tokens_per_gpu=tokens_per_gpu,
        )
        machine = _Machine(
            hardware=hardware,
            gpus_per_node=gpus_per_node,
            memory_bytes=memory * 1e9 if memory else load_hardware(hardware)[1].memory_bytes,
        )
        pairs = _pairs(load, machine, gpus or _DEFAULT_GPUS, redundant or _DEFAULT_REDUNDANT)
        every = [one for pair in pairs for one in pair]
        replayed = replay_all(readers, every, jobs=jobs, quiet=quiet)
        best = ranked(_options(load, machine, replayed))
    if as_json or not sys.stdout.isatty():
        print(json.dumps(_as_json(head, load.settings, best), indent=2))
    else:
        _print(head, best)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What is to be served.

    mean: the whole recording as one snapshot.
    tokens_per_gpu: tokens of a step on each GPU; None for as many as each recorded rank had.
    """

    head: TraceHead
    settings: RebalanceConfig
    mean: RecordedSnapshot
    tokens_per_gpu: float | None

    def factor(self, ranks: int) -> float:
        """Tokens of a step on that many ranks, divided by those of a recorded step."""
        head, mean = self.head, self.mean
        recorded = float(mean.counts_ALE.sum()) / (head.layers * head.top_k * mean.steps)
        return (self.tokens_per_gpu or recorded / head.ep_size) * ranks / recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """What it is to be served on.

    hardware: a name, or the path of a file.
    memory_bytes: bytes. The memory of a GPU.
    """

    hardware: str
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
    )
    assert isinstance(one.step_time, ModelledSteps)
    return replace(one, step_time=replace(one.step_time, load_factor=load.factor(ranks)))


def _options(load: _Load, machine: _Machine, replayed: Sequence[Replayed]) -> list[Advice]:
    """The expert-parallel options, and for each number of GPUs one with every expert cut over all GPUs.

    replayed: ours and none in turn, as in `_pairs`.
    """
    head, mean, memory = load.head, load.mean, machine.memory_bytes
    parallel = [
        advise_expert_parallel(head, mean, ours, none, memory)
        for ours, none in zip(replayed[::2], replayed[1::2], strict=True)
    ]
    each = {one.scenario.topology.num_ranks: one.scenario for one in replayed[::2]}
    return parallel + [advise_cut_experts(head, mean, one, memory) for one in each.values()]


def _print(head: TraceHead, best: list[Advice]) -> None:
    console = Console()
    console.print(_table(best))
    for number, option in enumerate(best, 1):
        console.print(f"{number:3}. {option.reason}", highlight=False)
    command = serve_command(head.model, best[0])
    console.print(_METHOD, style="dim", highlight=False)
    console.print(f"\nThe best:\n{command}", highlight=False, soft_wrap=True)


def serve_command(model: str, option: Advice) -> str:
    """The command that serves a model as this option says."""
    if not option.expert_parallel:
        return f"vllm serve {model} --tensor-parallel-size {option.ranks}"
    words = [f"vllm serve {model} --data-parallel-size {option.ranks} --enable-expert-parallel"]
    if option.saved > 0.0:
        words.append("--plugin ep_rebalance")
        if option.redundant:
            words.append(f"--ep-rebalance-config.planner.redundant_experts {option.redundant}")
    return " ".join(words)


def _slots(head: TraceHead, ranks: int, extra: int) -> int | None:
    """Redundant experts if each rank has `extra` more slots than it needs; None if that is impossible."""
    slots = -(-head.experts // ranks) + extra
    return None if slots > head.experts else slots * ranks - head.experts


def _summed(head: TraceHead, readers: list[TraceReader]) -> RecordedSnapshot:
    """All snapshots as one. Memory does not grow with their number."""
    group: list[RecordedSnapshot] = []
    for record in read_records(readers):
        if isinstance(record, RecordedSnapshot) and record.counts_ALE.any():
            group.append(record)
            if len(group) == _GROUP:
                group = [mean_snapshot(head, group)]
    if not group:
        raise NothingRecorded("the trace holds no snapshot with tokens; record while it serves")
    return mean_snapshot(head, group)


def _as_json(head: TraceHead, settings: RebalanceConfig, best: list[Advice]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "plugin_version": __version__,
        "model": head.model,
        "origin": head.origin or "recorded",
        "config": settings.as_dict(),
        "rows": [
            asdict(option) | {"saved": option.saved, "command": serve_command(head.model, option)}
            for option in best
        ],
    }


def _table(best: list[Advice]) -> Table:
    title = "Options, the best first by tokens/s for each GPU (modelled, not measured)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "GPUs", "experts", "copies", "max/mean", "home", "decode", "prefill", "step ms",
                 "saved", "tokens/s each", "weights each"):  # fmt: skip
        table.add_column(name, justify="left" if name == "experts" else "right", no_wrap=True)
    for number, option in enumerate(best, 1):
        table.add_row(
            str(number),
            str(option.ranks),
            "parallel" if option.expert_parallel else "cut",
            str(option.redundant),
            f"{option.imbalance:.2f}",
            f"{option.home_share:.0%}" if option.expert_parallel else "-",
            *(_longer(option, phase) for phase in ("decode", "prefill")),
            f"{1e3 * option.step_seconds:.1f}",
            f"{option.saved:.1%}" if option.expert_parallel else "-",
            f"{option.tokens_per_second_and_rank:,.0f}",
            decimal(option.weight_bytes) + ("" if option.fits else " !"),
        )
    return table


def _longer(option: Advice, name: str) -> str:
    """How much longer the phase's experts take than without redundant ones; "-" if that is not known."""
    found = [phase for phase in option.phases if phase.phase == name]
    return f"{found[0].longer:+.1%}" if found and option.extra_bytes else "-"
