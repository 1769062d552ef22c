"""How fast a long trace of DeepSeek-V3's shape is read and replayed, and in how much memory.

A trace is written to a temporary folder (1.2 GB for the default of 10,000 snapshots) with load of a
drifting mixture of domains. It is read once by numpy alone, as bytes into an array of as many counts,
and once by `TraceReader`, in alternating passes; then it is replayed in a process of its own, whose
peak memory is told, by one policy on one core. The time of plans is told apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from rich.console import Console
from rich.progress import track

from ep_rebalance import __version__
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import (
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
    TraceReader,
    TraceWriter,
)
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps, synthetic_domains
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.placement import Placement

SHAPE = SHAPES["deepseek-v3"]
RANKS, REDUNDANT = 32, 32
RECORDED = f"{RANKS}+{REDUNDANT}"
PAIRS = 128 * RANKS * 8 * 16
DISTINCT = 512
"""Snapshots that are drawn; a longer trace repeats them."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--snapshots", type=int, default=10_000, help="of the trace (default 10000)")
    add("--policy", default="ours", help="of ep-rebalance replay (default ours)")
    add("--passes", type=int, default=3, help="of reading (default 3)")
    add(
        "--layouts",
        nargs="+",
        default=[RECORDED],
        metavar="RANKS+REDUNDANT",
        help=f"to replay on, for example 8+0 32+32 256+0 (default {RECORDED}, as recorded)",
    )
    add("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_trace(folder: Path, snapshots: int, console: Console) -> None:
    start = Placement.contiguous(
        num_layers=SHAPE.layers,
        num_experts=SHAPE.experts,
        num_ranks=RANKS,
        num_redundant=REDUNDANT,
    )
    head = TraceHead(
        model=SHAPE.title,
        layers=SHAPE.layers,
        experts=SHAPE.experts,
        top_k=SHAPE.top_k,
        ep_size=RANKS,
        slots=start.num_slots,
        node_of_rank=[rank // 8 for rank in range(RANKS)],
        expert_bytes=[SHAPE.expert_bytes] * SHAPE.layers,
        hidden_size=7168,
        engine="",
        plugin_version=__version__,
        started=0.0,
        config=load_config({"planner": {"redundant_experts": REDUNDANT}}).as_dict(),
        origin="generated, drifting between domains",
    )
    domains = synthetic_domains(domains=6, layers=SHAPE.layers, experts=SHAPE.experts, seed=0)
    drawn = generate_steps(domains, TIMINGS["drift"], pairs_per_step=PAIRS, seed=0)
    distinct = [
        np.stack([counts // 4, counts - counts // 4]).astype(np.uint32)
        for counts in itertools.islice(drawn, min(DISTINCT, snapshots))
    ]
    writer = TraceWriter(folder, "load", head, max_file_bytes=4 << 30, max_bytes=16 << 30)
    writer.write(
        RecordedPlacement(
            placement=start, quotas_LP=start.even_quotas_LP(), generation=0, step=0, time=0.0
        )
    )
    for number in track(range(snapshots), "writing the trace", console=console, transient=True):
        writer.write(
            RecordedSnapshot(
                counts_ALE=distinct[number % len(distinct)],
                step=16 * (number + 1),
                steps=16,
                step_seconds=0.05,
                time=0.8 * number,
                generation=0,
            )
        )
    writer.close()


def read_by_numpy(path: Path, snapshots: int) -> float:
    """Seconds to read as many bytes of counts into arrays."""
    began = time.perf_counter()
    size = 2 * SHAPE.layers * SHAPE.experts
    with path.open("rb") as file:
        for _ in range(snapshots):
            np.fromfile(file, np.uint32, size)
    return time.perf_counter() - began


def read_by_trace_reader(path: Path) -> float:
    began = time.perf_counter()
    for _ in TraceReader(path):
        pass
    return time.perf_counter() - began


def replay_here(folder: Path, policy: str, layout: str) -> None:
    """In the child process: replay, and print what it took."""
    from ep_rebalance.commands.scenarios import settings_for
    from ep_rebalance.commands.side_by_side import replay_all
    from ep_rebalance.offline.scenarios import open_traces, scenario

    readers = open_traces([folder])
    head = readers[0].head
    ranks, redundant = map(int, layout.split("+"))
    one = scenario(head, settings_for(head, None, []), policy, ranks, redundant)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    (replayed,) = replay_all(readers, [one], jobs=1, quiet=True)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "plan_seconds": sum(replayed.plan_seconds),
                "plans": len(replayed.plan_seconds),
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                "before_mib": before >> 10,
                "balancedness": replayed.mean_balancedness,
                "moved": replayed.moved,
            }
        )
    )


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(stderr=True)
    if options.child:
        replay_here(options.child, options.policy, *options.layouts)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_trace(folder, options.snapshots, console)
        (path,) = folder.glob("*.eptrace")
        pairs = [
            (read_by_numpy(path, options.snapshots), read_by_trace_reader(path))
            for _ in range(options.passes)
        ]
        command = [sys.executable, __file__, "--child", name, "--policy", options.policy]
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        told = {
            layout: json.loads(
                subprocess.run(
                    [*command, "--layouts", layout], env=alone, check=True, stdout=-1
                ).stdout
            )
            for layout in options.layouts
        }
    ratios = [ours / numpy for numpy, ours in pairs]
    each = 1e6 * np.median([ours for _, ours in pairs]) / options.snapshots
    print(
        f"reading a snapshot of {SHAPE.title}: {each:.0f} us, {np.median(ratios):.2f} times numpy's "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    for layout, one in told.items():
        print(
            f"replay of {options.snapshots} snapshots, policy {options.policy}, EP{layout}: "
            f"{one['seconds'] - one['plan_seconds']:.1f} s and {one['plan_seconds']:.1f} s for "
            f"{one['plans']} plans; balancedness {one['balancedness']:.3f}, {one['moved']} experts moved; "
            f"peak memory {one['peak_mib']} MiB, {one['before_mib']} MiB before it began"
        )
    print(machine())


if __name__ == "__main__":
    main()
