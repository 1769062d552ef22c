"""Compare placement policies on load that they have not seen.

A placement made from the windows up to one moment is scored on the steps of the next window. The load is
recorded, or generated in two ways that have nothing in common: mixtures of experts' popularities (`real`,
`steady`, `drift`, `burst`; ep_rebalance/offline/generated_load.py) and tokens through random routers
(`router`, `router burst`; planning_router.py). Peers run on the same steps:
  contiguous    experts in order, as the engine loads them
  never move    the placement of the first window, kept
  greedy        the published DeepSeek EPLB algorithm, anew from each window; so is any other policy
  vLLM          the installed vLLM's policy, anew from each window; `vLLM groups` its branch for
                DeepSeek's expert groups, where those divide by the nodes
  ep_rebalance  the plugin's window, planner and decision at their defaults
  hindsight     a placement made from the very steps that it is scored on

Columns: balancedness (mean over mean/max rank load of steps and layers; 1 is even) with every
expert's tokens split evenly over its replicas; with the plugin's quotas, refreshed each snapshot;
with each rank's tokens of a step split evenly by its own counts (`dispatch.split: own_counts`), in one
step of each window; and with the best split for each step, which no dispatch can beat on that placement.
Slots that a plan changes; GB over links in all and on the busiest rank, per plan; expert transfers that the
busiest rank makes one after another in a layer; parts of moved experts and of tokens that cross a node
boundary; milliseconds to plan, and microseconds to fit one layer's quotas, on one core. The table at the
end says by load how far the plugin is ahead of vLLM and of never moving, and where it is worst.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import yaml
from machine import machine
from planning_cases import Case, chosen_cases, load_of
from planning_policies import (
    Anew,
    Hindsight,
    Kept,
    Ours,
    Policy,
    Steps,
    place_anew,
    vllm_policies,
)
from planning_score import SNAPSHOT_STEPS, WINDOW_STEPS, Row, score_policy, snapshot_of
from planning_table import show, summarize
from rich.console import Console
from rich.progress import Progress

from ep_rebalance.config_sources import load_config, nest
from ep_rebalance.load.window import window_load
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import compile_planner, own_planners
from ep_rebalance.topology import Topology

RANKS_PER_NODE = 8


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="repetitions with other load (default 3)")
    add("--windows", type=int, default=20, help="windows of 48 steps each (default 20)")
    add("--only", default="", help="cases whose title contains this, e.g. 'real: EP32'")
    add("--policies", default="", help="these policies only, by comma")
    add(
        "--data",
        type=Path,
        default=os.environ.get("EP_REBALANCE_DATA"),
        help="folder with recorded loads: deepseek-logical-counts/*.json (SGLang) and "
        "gpt-oss-20b/*.npz; cases that need them are left out without it "
        "(default: EP_REBALANCE_DATA)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the plugin")
    add("--fast", action="store_true", help="leave out the best split and hindsight")
    add("--output", type=Path, help="write everything measured to this JSON file")
    return parser.parse_args()


def run_case(
    case: Case, seed: int, options: argparse.Namespace, advance: Callable[[], None]
) -> Iterator[Row]:
    steps = load_of(case, seed, options.data)
    windows = [
        np.stack(list(itertools.islice(steps, WINDOW_STEPS))) for _ in range(options.windows)
    ]
    topology = Topology(node_of_rank=tuple(r // RANKS_PER_NODE for r in range(case.ranks)))
    for policy in policies_of(case, topology, windows[0], options):
        if not options.policies or policy.name in options.policies.split(","):
            yield score_policy(policy, case, seed, windows, topology, best_split=not options.fast)
        advance()


def policies_of(
    case: Case, topology: Topology, first_NLE: Steps, options: argparse.Namespace
) -> list[Policy]:
    """first_NLE: int64 [N, L, E]. The steps that the kept placement is made from, and the plugin's first."""
    shape = case.model
    contiguous = Placement.contiguous(
        num_layers=shape.layers,
        num_experts=shape.experts,
        num_ranks=case.ranks,
        num_redundant=case.redundant,
    )
    first = [snapshot_of(part) for part in np.split(first_NLE, WINDOW_STEPS // SNAPSHOT_STEPS)]
    start = place_anew(window_load(first), contiguous, topology)
    config = load_config(*(setting(text) for text in options.set))
    policies: list[Policy] = [
        Kept("contiguous", contiguous),
        Kept("never move", start),
        *(
            Anew(name, planner, contiguous, topology)
            for name, planner in own_planners().items()
            if name not in ("incremental", "none")
        ),
        *vllm_policies(contiguous, topology, grouped=case.shape == "deepseek-v3"),
        Ours(config, start, topology, [shape.expert_bytes] * shape.layers),
    ]
    if not options.fast:
        policies.append(Hindsight(contiguous, topology))
    return policies


def setting(text: str) -> dict[str, Any]:
    keys, _, value = text.partition("=")
    return nest(keys.split("."), yaml.safe_load(value))


def main() -> None:
    options, console = parse_options(), Console(width=165)
    compile_planner()
    rows: list[Row] = []
    cases = chosen_cases(options.only, recordings=options.data is not None)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=len(cases) * options.seeds * 6)
        for case in cases:
            own = [
                row
                for seed in range(options.seeds)
                for row in run_case(case, seed, options, lambda: progress.advance(task))
            ]
            show(case, own, console)
            rows += own
    summarize(rows, console)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")
    if options.output:
        content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(content, default=str))


if __name__ == "__main__":
    main()
