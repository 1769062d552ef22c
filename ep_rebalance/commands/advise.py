"""`ep-rebalance advise`: how to serve the recorded load."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

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
from ep_rebalance.offline.run import NothingRecorded, Scenario
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.offline.step_time import ModelledSteps, hardware_names, load_hardware
from ep_rebalance.version import __version__

_GROUP = 256
"""Snapshots that are held at once to be summed up."""


def advise(
    traces: Annotated[
        list[Path], typer.Argument(help="Trace files (*.eptrace), or folders of them.")
    ],
    hardware: Annotated[
        str,
        typer.Option(
            help=f"Accelerator: {', '.join(hardware_names())}, or a YAML file of its figures."
        ),
    ],
    gpus: Annotated[
        list[int] | None,
        typer.Option(min=2, help="GPUs. Repeat for several.", show_default="8, 16, 32"),
    ] = None,
    redundant: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Redundant experts for each GPU. Repeat.", show_default="0, 1, 2"),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=1, help="GB of a GPU.", show_default="the hardware's")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    tokens_per_gpu: Annotated[
        float | None,
        typer.Option(min=1, help="Tokens of a step on each GPU.", show_default="as recorded"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings of the plugin.", show_default="the recorded server's"),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Replays at a time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Is expert parallelism worth it for this load, on how many GPUs, with how many redundant experts?

      ep-rebalance advise load.eptrace --hardware h100-sxm --gpus 8 --gpus 16

    Step times are modelled from the hardware's figures, not measured: trust the order more than the
    numbers.
    """
    with explained():
        readers = open_traces(traces)
        head = completed(readers[0].head)
        settings = settings_for(head, config, [])
        mean = _summed(head, readers)
        recorded_tokens = mean.counts_ALE.sum() / (head.layers * head.top_k * mean.steps)
        wanted = tokens_per_gpu or recorded_tokens / head.ep_size
        pairs: list[tuple[Scenario, Scenario]] = []
        for ranks, extra in product(gpus or [8, 16, 32], redundant or [0, 1, 2]):
            copies = _slots(head, ranks, extra)
            if copies is None:
                continue
            ours, none = (
                _loaded(
                    scenario(head, settings, policy, ranks, copies, gpus_per_node, hardware),
                    wanted * ranks / recorded_tokens,
                )
                for policy in ("ours", "none")
            )
            pairs.append((ours, none))
        if not pairs:
            raise ValueError(f"{head.experts} experts cannot be shared by that many GPUs")
        replayed = replay_all(
            readers, [one for pair in pairs for one in pair], jobs=jobs, quiet=quiet
        )
        available = memory * 1e9 if memory else load_hardware(hardware)[1].memory_bytes
        options = [
            advise_expert_parallel(head, mean, ours, none, available)
            for ours, none in zip(replayed[::2], replayed[1::2], strict=True)
        ]
        each = {one.topology.num_ranks: one for one, _ in pairs}
        options += [advise_cut_experts(head, mean, one, available) for one in each.values()]
    best = ranked(options)
    if as_json or not sys.stdout.isatty():
        print(json.dumps(_as_json(head, settings, best), indent=2))
        return
    console = Console()
    console.print(_table(best))
    for number, option in enumerate(best, 1):
        console.print(f"{number:3}. {option.reason}", highlight=False)
    command = serve_command(head.model, best[0])
    console.print(f"\nThe best:\n{command}", highlight=False, soft_wrap=True)


def serve_command(model: str, option: Advice) -> str:
    """What to type for it."""
    if not option.expert_parallel:
        return f"vllm serve {model} --tensor-parallel-size {option.ranks}"
    words = [f"vllm serve {model} --data-parallel-size {option.ranks} --enable-expert-parallel"]
    if option.saved > 0.0:
        words.append("--plugin ep_rebalance")
        if option.redundant:
            words.append(f"--ep-rebalance-config.planner.redundant_experts {option.redundant}")
    return " ".join(words)


def _slots(head: TraceHead, ranks: int, extra: int) -> int | None:
    """Redundant experts for `extra` more slots a rank than are needed; None if that cannot be."""
    slots = -(-head.experts // ranks) + extra
    return None if slots > head.experts else slots * ranks - head.experts


def _loaded(one: Scenario, factor: float) -> Scenario:
    assert isinstance(one.step_time, ModelledSteps)
    return replace(one, step_time=replace(one.step_time, load_factor=factor))


def _summed(head: TraceHead, readers: list[TraceReader]) -> RecordedSnapshot:
    """All snapshots as one, in memory that does not grow with them."""
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
    for name in ("", "GPUs", "experts", "copies", "max/mean", "step ms", "saved", "tokens/s each",
                 "weights each"):  # fmt: skip
        table.add_column(name, justify="left" if name == "experts" else "right", no_wrap=True)
    for number, option in enumerate(best, 1):
        table.add_row(
            str(number),
            str(option.ranks),
            "parallel" if option.expert_parallel else "cut",
            str(option.redundant),
            f"{option.imbalance:.2f}",
            f"{1e3 * option.step_seconds:.1f}",
            f"{option.saved:.1%}" if option.expert_parallel else "-",
            f"{option.tokens_per_second_and_rank:,.0f}",
            decimal(option.weight_bytes) + ("" if option.fits else " !"),
        )
    return table
