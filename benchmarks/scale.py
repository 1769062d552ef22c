"""What one rank of 8 to 1,024 pays for being balanced: seconds and bytes of every stage against the ranks.

Everything runs in this process, by the code that a server runs. The other ranks are a `fake` process
group of torch, whose collectives return at once: what a collective carries is in the bytes, what the host
does around it in the seconds, and how long the network takes in neither. Experts are a kilobyte long,
except where rounds are worked out.

Each deployment has as few redundant experts as fill all ranks alike, at least 32 and two slots a rank.
So from 256 ranks on a layer's slots grow with the ranks, and with them what is written down for each slot.

Seconds are CPU time of this thread, not wall time, since other work on the machine would be in that. The
sizes take turns; the median counts. `growth` is the exponent of ranks that the two largest sizes above 200
differ by: 0 does not grow, 1 grows with the ranks, 2 with their square. Figures below 20 us say little.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scale_stages import ON_THE_STEP_PATH, Deployment, Stage, redundant_experts, stages
from torch.testing._internal.distributed.fake_pg import FakeStore

from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.planning.policies import compile_planner

RANKS = (8, 32, 64, 144, 256, 512, 1024)
FITTED_FROM = 200
"""Ranks. Growth is fitted between the least and the most of at least so many."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--ranks",
        default=",".join(map(str, RANKS)),
        help="sizes, with commas (default %(default)s)",
    )
    add("--shape", default="deepseek-v3", choices=SHAPES, help="model (default %(default)s)")
    add("--tokens", type=int, default=128, help="of a rank in a step (default %(default)s)")
    add("--repetitions", type=int, default=25, help="of each stage at most (default %(default)s)")
    add(
        "--seconds", type=float, default=3.0, help="for one stage of one size (default %(default)s)"
    )
    add("--only", default="", help="stages whose name contains this")
    return parser.parse_args()


def own_seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def time_in_turns(stages_R: Sequence[Stage], repetitions: int, seconds: float) -> list[list[float]]:
    """Times of one stage at each size, after one that is not kept."""
    times_R: list[list[float]] = [[] for _ in stages_R]
    for repetition in range(repetitions + 1):
        for stage, times in zip(stages_R, times_R, strict=True):
            if repetition > 1 and sum(times) > seconds:
                continue
            if stage.before is not None:
                stage.before()
            taken = own_seconds(stage.run)
            if repetition:
                times.append(taken)
    return times_R


def growth(ranks: Sequence[int], values: Sequence[float | None]) -> str:
    """The exponent of ranks between the least and the most large size."""
    large = [(r, v) for r, v in zip(ranks, values, strict=True) if r >= FITTED_FROM and v]
    if len(large) < 2:
        return ""
    (fewer, less), (more, most) = large[0], large[-1]
    return f"{math.log(most / less) / math.log(more / fewer):.2f}"


def seconds_in_words(seconds: float) -> str:
    """With three digits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.2g} us"


def bytes_in_words(size: int | None) -> str:
    """With three digits."""
    if size is None:
        return ""
    for unit, name in ((1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return str(size)


def print_tables(
    ranks: Sequence[int], by_stage: dict[str, list[Stage]], medians: dict[str, list[float]]
) -> Table:
    """One row for each stage."""
    table = Table(title="CPU time of one rank; bytes at the largest size")
    for heading in ("where", "stage", *(f"{r:,}" for r in ranks), "growth", "bytes", "growth"):
        table.add_column(heading, justify="left" if heading in ("where", "stage") else "right")
    before = ""
    for name, stages_R in by_stage.items():
        where, sizes = stages_R[0].where, [stage.size for stage in stages_R]
        table.add_row(
            "" if where == before else where,
            name,
            *map(seconds_in_words, medians[name]),
            growth(ranks, medians[name]),
            bytes_in_words(sizes[-1]),
            growth(ranks, sizes),
        )
        before = where
    return table


def print_largest(
    ranks: int, by_stage: dict[str, list[Stage]], medians: dict[str, list[float]], console: Console
) -> None:
    """The largest cost of a step, by the kind of step."""
    on_path: dict[str, list[str]] = defaultdict(list)
    for name, stages_R in by_stage.items():
        if stages_R[0].where in ON_THE_STEP_PATH:
            on_path[stages_R[0].where].append(name)
    for where, names in on_path.items():
        largest = max(names, key=lambda name: medians[name][-1])
        seconds = seconds_in_words(medians[largest][-1])
        console.print(f"Most at {ranks:,} ranks, {where}: {largest}, {seconds}.")


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(width=190)
    ranks, shape = sorted(map(int, options.ranks.split(","))), SHAPES[options.shape]
    torch.set_num_threads(1)
    compile_planner()
    dist.init_process_group("fake", rank=0, world_size=ranks[-1], store=FakeStore())
    with tempfile.TemporaryDirectory(prefix="ep-rebalance-scale-") as folder:
        by_stage: dict[str, list[Stage]] = defaultdict(list)
        for size in track(ranks, "deployments"):
            deployment = Deployment(shape, size, options.tokens, Path(folder))
            for stage in stages(deployment):
                if options.only in stage.name:
                    by_stage[stage.name].append(stage)
        gc.freeze()
        medians = {
            name: [
                stage.times * float(np.median(times))
                for stage, times in zip(
                    stages_R,
                    time_in_turns(stages_R, options.repetitions, options.seconds),
                    strict=True,
                )
            ]
            for name, stages_R in track(by_stage.items(), "stages", total=len(by_stage))
        }
    console.print(f"{shape.title}: {shape.layers} layers of {shape.experts} experts and, for")
    console.print(
        ", ".join(f"{r:,} ranks, {redundant_experts(shape, r):,} redundant" for r in ranks)
    )
    console.print(print_tables(ranks, by_stage, medians))
    print_largest(ranks[-1], by_stage, medians, console)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
