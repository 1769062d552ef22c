#!/usr/bin/env python3
"""Cold start: how soon a server that begins with its experts in contiguous order is balanced.

The plugin's own loop serves generated, steady load of DeepSeek-V3's size on 32 ranks with 32 redundant
experts (`ReplayedServer`): plans come from snapshots, are ready at the next one, and are carried out in the
real schedule of rounds. Each snapshot is scored with the placement and quotas that served it, which were
made before it. For each case and seed:

    steps     engine steps until the first snapshot with balancedness .90 has ended
    mean      balancedness of the first 1,000 steps; in brackets that of the contiguous order
    had       part of the time in which experts wait for the busiest rank that was saved in the first 1,000
              steps, of what the best placement for their load would have saved from step 0 on
    end       balancedness of the last 200 steps; in brackets that of that best placement, in its steps
    plans     the first three that were served: when asked for, when whole, experts moved
    seconds   the longest wall time of a plan on this machine, for which the replay does not wait

Run it as `python benchmarks/cold_start.py`. It takes a minute for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from machine import machine
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config, nest
from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.load.window import LoadSample, window_load
from ep_rebalance.migration.served import Served
from ep_rebalance.offline.balancing import ReplayedServer
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps, synthetic_domains
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.cost_model import cost_model
from ep_rebalance.planning.policies import compile_planner, planner_of
from ep_rebalance.planning.problem import Problem
from ep_rebalance.planning.proposal import Proposer
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology

SHAPE = SHAPES["deepseek-v3"]
EXPERT_BYTES_L = [SHAPE.expert_bytes] * SHAPE.layers
RANKS, REDUNDANT, TOKENS_PER_RANK = 32, 32, 128
CONTIGUOUS = Placement.contiguous(
    num_layers=SHAPE.layers, num_experts=SHAPE.experts, num_ranks=RANKS, num_redundant=REDUNDANT
)
SNAPSHOT_STEPS = 17
"""The steps that are counted, and the one in which ranks sum them up."""
STEP_SECONDS = 0.02
GOAL, FIRST_STEPS, LAST_STEPS = 0.90, 1_000, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One server.

    ranks_per_node: on links of 300 GB/s, and 45 GB/s between nodes.
    steps: how many are served.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    ranks_per_node: int = RANKS
    steps: int = 1_200

    @property
    def topology(self) -> Topology:
        nodes = Topology.node_by_node(RANKS, self.ranks_per_node)
        return nodes.with_links(intranode=300e9, internode=45e9)


CASES = (
    Case(
        title="4 MiB a step",
        settings={"migration": {"max_bytes_per_step": 4 << 20}},
        steps=2_600,
    ),
    Case(title="auto"),
    Case(title="auto, 4 nodes", ranks_per_node=8),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What was served.

    balancedness_N, imbalance_N: float64 [N], means over layers. Of each snapshot.
    plans: of those that were served, when they were asked for, when whole, and how many experts moved.
    plan_seconds: wall time of each plan.
    """

    balancedness_N: NDArray[np.float64]
    imbalance_N: NDArray[np.float64]
    plans: Sequence[tuple[int, int, int]] = ()
    plan_seconds: Sequence[float] = ()

    @property
    def steps_to_goal(self) -> int | None:
        reached = np.flatnonzero(self.balancedness_N >= GOAL)
        return int(reached[0] + 1) * SNAPSHOT_STEPS if reached.size else None


class Clocked:
    """A planner, and the wall time of each plan."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._planner = planner_of("incremental")

    def __call__(self, problem: Problem) -> Placement:
        began = time.perf_counter()
        placement = self._planner(problem)
        self.seconds.append(time.perf_counter() - began)
        return placement


def snapshots(seed: int, steps: int) -> Iterator[NDArray[np.int64]]:
    """int64 [L, E] for each snapshot."""
    domains_DLE = synthetic_domains(
        domains=8, layers=SHAPE.layers, experts=SHAPE.experts, seed=seed
    )
    pairs = RANKS * TOKENS_PER_RANK * SHAPE.top_k
    stream = generate_steps(domains_DLE, TIMINGS["steady"], pairs_per_step=pairs, seed=seed)
    for _ in range(-(-steps // SNAPSHOT_STEPS)):
        yield sum(itertools.islice(stream, SNAPSHOT_STEPS), np.zeros((), np.int64))


def serve(case: Case, config: RebalanceConfig, counts_NLE: NDArray[np.int64]) -> Outcome:
    """The plugin's loop over the load, from contiguous order."""
    planner = Clocked()
    server = ReplayedServer(
        config,
        proposer=Proposer(
            planner=planner,
            settings=config.planner,
            decision=config.decision,
            migration=config.migration,
            cost=cost_model(config),
            topology=case.topology,
            expert_bytes_L=EXPERT_BYTES_L,
        ),
        topology=case.topology,
        expert_bytes_L=EXPERT_BYTES_L,
        served=Served.initial(CONTIGUOUS),
        loaded=CONTIGUOUS,
    )
    scores = []
    for number, counts_LE in enumerate(counts_NLE):
        server.snapshot(recorded(counts_LE, number))
        scores.append(score(counts_LE, server.placement, server.quotas_LP))
    made = [(p.step, p.served_at or 0, p.moved) for p in server.plans if p.generation is not None]
    return outcome_of(scores, plans=made, plan_seconds=planner.seconds)


def kept(
    counts_NLE: NDArray[np.int64], placement: Placement, quotas_LP: NDArray[np.float64]
) -> Outcome:
    """A placement that is served from step 0 on."""
    return outcome_of([score(counts_LE, placement, quotas_LP) for counts_LE in counts_NLE])


def best_for(counts_NLE: NDArray[np.int64], topology: Topology) -> Outcome:
    """The best placement for this load, which no server knows in advance."""
    window = window_load([sample(counts_LE) for counts_LE in counts_NLE])
    placement = place_anew(window, CONTIGUOUS, topology)
    return kept(counts_NLE, placement, split_quotas(placement, window.load_LE))


def outcome_of(scores: Sequence[tuple[float, float]], **others: Any) -> Outcome:
    balancedness_N, imbalance_N = np.array(scores).T
    return Outcome(balancedness_N=balancedness_N, imbalance_N=imbalance_N, **others)


def score(
    counts_LE: NDArray[np.int64], placement: Placement, quotas_LP: NDArray[np.float64]
) -> tuple[float, float]:
    """(balancedness, imbalance), means over layers."""
    layer_imbalance_L = imbalance_L(placement.rank_load_LR(counts_LE, quotas_LP))
    return float(np.mean(1.0 / layer_imbalance_L)), float(np.mean(layer_imbalance_L))


def sample(counts_LE: NDArray[np.int64]) -> LoadSample:
    return recorded(counts_LE, 0).sample()


def recorded(counts_LE: NDArray[np.int64], number: int) -> RecordedSnapshot:
    return RecordedSnapshot(
        counts_ALE=np.stack([np.zeros_like(counts_LE), counts_LE]),
        step=(number + 1) * SNAPSHOT_STEPS,
        steps=SNAPSHOT_STEPS,
        step_seconds=STEP_SECONDS,
        time=0.0,
        generation=0,
    )


def row(case: Case, seed: int, outcome: Outcome, counts_NLE: NDArray[np.int64]) -> tuple[str, ...]:
    """A line of the table."""
    first, last = FIRST_STEPS // SNAPSHOT_STEPS, LAST_STEPS // SNAPSHOT_STEPS
    before = kept(counts_NLE[:first], CONTIGUOUS, CONTIGUOUS.even_quotas_LP())
    best = best_for(counts_NLE[:first], case.topology)
    saved = (before.imbalance_N - outcome.imbalance_N[:first]).sum()
    possible = (before.imbalance_N - best.imbalance_N).sum()
    mean, contiguous = (o.balancedness_N[:first].mean() for o in (outcome, before))
    return (
        case.title,
        str(seed),
        str(outcome.steps_to_goal or f"over {case.steps}"),
        f"{mean:.3f} ({contiguous:.3f})",
        f"{saved / possible:.0%}",
        f"{outcome.balancedness_N[-last:].mean():.3f} ({best.balancedness_N.mean():.3f})",
        " ".join(f"{asked}-{whole}: {moved}" for asked, whole, moved in outcome.plans[:3]),
        f"{max(outcome.plan_seconds, default=0.0):.2f}",
    )


def setting(text: str) -> dict[str, Any]:
    keys, _, value = text.partition("=")
    return nest(keys.split("."), yaml.safe_load(value))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="repetitions with other load (default 3)")
    add("--only", default="", help="cases whose title contains this")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the plugin")
    return parser.parse_args()


def main() -> None:
    """Serve and print."""
    options, console = parse_options(), Console(width=130)
    compile_planner()
    cases = [case for case in CASES if options.only in case.title]
    table = Table(title=f"{SHAPE.title}, EP{RANKS}, {REDUNDANT} redundant", title_justify="left")
    for head in ("case", "seed", "steps", "mean", "had", "end", "plans", "seconds"):
        table.add_column(head)
    for seed in range(options.seeds):
        load_NLE = np.stack(list(snapshots(seed, max(case.steps for case in cases))))
        for case in cases:
            counts_NLE = load_NLE[: case.steps // SNAPSHOT_STEPS]
            redundant = {"planner": {"redundant_experts": REDUNDANT}}
            config = load_config(redundant, case.settings, *map(setting, options.set))
            table.add_row(*row(case, seed, serve(case, config, counts_NLE), counts_NLE))
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")


if __name__ == "__main__":
    main()
