"""How long the rounds of a migration take to work out, and what the engine notices of it.

Every worker works out the rounds of an accepted plan in a thread, beside the engine's own Python. For
each model two placements are made that differ by swaps in the given part of all slots, with at most
two arrivals per rank and layer. Then these are measured:

    time      of one schedule with this rank's itinerary: median, and from the fastest to the slowest
    slowdown  of a pure Python loop of about 1 ms while another thread schedules without a pause: mean
              time against the same loop beside a thread that needs no interpreter lock, in alternating
              turns; 1.00 where the lock is never held
    lost      what such Python loses to one schedule, in ms: with one plan a minute, once a minute
    longest   such loop in ms beside the schedule; and beside the thread without the lock

`layers x experts` counts redundant slots behind the plus. A small `--bytes` gives many rounds. With other
work on the machine the slowdown means nothing.

    python benchmarks/schedule.py
    python benchmarks/schedule.py --moved 0.02 --bytes 67108864 --repetitions 50
"""

from __future__ import annotations

import argparse
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from machine import machine
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ep_rebalance.migration import Migration, compile_schedule, schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.topology import Topology

ARRIVALS = 2
"""Into a rank, per layer: the default of planner.max_arrivals_per_rank_and_layer."""
STAGING_SLOTS = 9
"""What the default of migration.max_staging_bytes gives for experts of 44 MB."""
LOOP = 30_000
"""Turns of the pure Python loop, about 1 ms."""
TURN_SECONDS = 0.2
WORK = bytes(4 << 20)


HEADINGS = (
    "model",
    "layers x experts",
    "ranks",
    "moves",
    "transfers",
    "rounds",
    "time ms",
    "spread",
    "slowdown",
    "lost",
    "longest",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model on a cluster of nodes with eight ranks each."""

    name: str
    layers: int
    experts: int
    ranks: int
    redundant: int
    expert_bytes: int


SIZES = (
    Size(name="Qwen3-30B", layers=48, experts=128, ranks=8, redundant=8, expert_bytes=9_437_184),
    Size(name="GLM-4.5", layers=89, experts=160, ranks=16, redundant=16, expert_bytes=23_592_960),
    Size(
        name="DeepSeek-V3", layers=58, experts=256, ranks=32, redundant=32, expert_bytes=44_040_192
    ),
    Size(
        name="DeepSeek-V3", layers=58, experts=256, ranks=64, redundant=64, expert_bytes=44_040_192
    ),
)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--moved", type=float, default=0.1, help="part of all slots that changes (default 0.1)")
    add("--bytes", type=int, default=4 << 20, help="per rank and round (default 4 MiB)")
    add("--repetitions", type=int, default=20, help="schedules that are timed (default 20)")
    add("--seconds", type=float, default=4, help="of loops for each model (default 4)")
    return parser.parse_args()


def swapped(source: Placement, moved: float, generator: np.random.Generator) -> Placement:
    """As many slots changed, by swaps of experts between two ranks of a layer."""
    slots_LP = source.slots_LP.copy()
    for slots_P in slots_LP:
        swap_in_layer(slots_P, source, round(moved * source.num_slots / 2), generator)
    return Placement(slots_LP, source.num_experts, source.num_ranks)


def swap_in_layer(
    slots_P: NDArray[np.int32], source: Placement, swaps: int, generator: np.random.Generator
) -> None:
    """Swaps that leave a valid placement, in place."""
    arrivals_R, changed = np.zeros(source.num_ranks, dtype=int), set[int]()
    by_rank = slots_P.reshape(source.num_ranks, -1)
    for _ in range(50 * swaps):
        one, other = generator.integers(0, source.num_slots, 2).tolist()
        here, there = one // source.slots_per_rank, other // source.slots_per_rank
        fits = slots_P[one] not in by_rank[there] and slots_P[other] not in by_rank[here]
        room = max(arrivals_R[here], arrivals_R[there]) < ARRIVALS
        if swaps and fits and room and not changed & {one, other}:
            slots_P[[one, other]] = slots_P[[other, one]]
            arrivals_R[[here, there]] += 1
            changed |= {one, other}
            swaps -= 1


def job_of(size: Size, options: argparse.Namespace) -> Callable[[], Migration]:
    """Works out one migration of this size, for rank 0."""
    source = Placement.contiguous(
        num_layers=size.layers,
        num_experts=size.experts,
        num_ranks=size.ranks,
        num_redundant=size.redundant,
    )
    target = swapped(source, options.moved, np.random.default_rng(0))
    quotas_LP = target.even_quotas_LP()
    topology = Topology.node_by_node(size.ranks, 8)
    return lambda: schedule(
        source,
        target,
        quotas_LP,
        topology=topology,
        expert_bytes_L=[size.expert_bytes] * size.layers,
        pace=Pace.of_bytes(options.bytes),
        staging_slots=STAGING_SLOTS,
        rank=0,
    )


def milliseconds(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return 1e3 * (time.perf_counter() - began)


def python_loop() -> int:
    total = 0
    for number in range(LOOP):
        total += number
    return total


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Milliseconds of each pure Python loop beside a job, and how often the job was done."""

    loops: NDArray[np.float64]
    jobs: int


def beside(job: Callable[[], object], seconds: float) -> Beside:
    """Time loops while another thread does the job again and again."""
    over, jobs = threading.Event(), 0

    def keep_working() -> None:
        nonlocal jobs
        while not over.is_set():
            job()
            jobs += 1

    thread = threading.Thread(target=keep_working)
    thread.start()
    times, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends:
        times.append(milliseconds(python_loop))
    over.set()
    thread.join()
    return Beside(loops=np.array(times), jobs=jobs)


def in_turns(jobs: Sequence[Callable[[], object]], seconds: float) -> list[Beside]:
    """Loops beside each of the jobs, `seconds` in all, so that a slow spell meets all of them alike."""
    rounds = max(1, round(seconds / TURN_SECONDS / len(jobs)))
    turns = [[beside(job, TURN_SECONDS) for job in jobs] for _ in range(rounds)]
    return [
        Beside(
            loops=np.concatenate([one.loops for one in of_job]), jobs=sum(t.jobs for t in of_job)
        )
        for of_job in zip(*turns, strict=True)
    ]


def without_lock() -> None:
    """Work that releases the interpreter lock for nearly all of its time."""
    hashlib.sha256(WORK)


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(width=max(130, Console().width))
    compile_schedule()
    table = Table(
        title=f"{options.moved:.0%} of all slots, {options.bytes / 2**20:g} MiB per round"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[2:] else "left")
    for size in SIZES:
        job = job_of(size, options)
        migration = job()
        times = np.array([milliseconds(job) for _ in range(options.repetitions)])
        quiet, busy = in_turns((without_lock, job), options.seconds)
        lost = (busy.loops - quiet.loops.mean()).sum() / busy.jobs
        table.add_row(
            size.name,
            f"{size.layers} x {size.experts}+{size.redundant}",
            str(size.ranks),
            f"{migration.num_moves:,}",
            f"{sum(len(batch.rounds.move) for batch in migration.batches):,}",
            f"{migration.num_rounds:,}",
            f"{np.median(times):.1f}",
            f"{times.min():.1f} to {times.max():.1f}",
            f"{busy.loops.mean() / quiet.loops.mean():.2f}",
            f"{lost:.2f}",
            f"{busy.loops.max():.1f} ({quiet.loops.max():.1f})",
        )
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")


if __name__ == "__main__":
    main()
