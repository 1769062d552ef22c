"""What is learned of the experts' part of a step, beside what is true, without an engine.

Two ranks' layers are computed in this process, one rank after the other. Each part is timed by the
processor time that it takes, the least of REPEATS, so that a busy machine disturbs less. A step takes, in
each layer, as long as the slowest rank's dense part, and as the slowest rank's experts. The engine's own
`Proposer` sees these steps in snapshots, moves experts, and learns. Nothing is sent, so there is no
all-to-all in a step.

What waits is known in two ways:

  apart      the slowest experts of each layer, over the step: an upper bound, since a part of their time
             is the same for any number of tokens, and no placement changes it
  by moving  every eighth step is computed again, with the same tokens, on a placement that evens them
             out: what the step becomes shorter by, over what the busiest ranks' tokens become fewer by
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from serving_model import ModelShape

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.window import LoadSample
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.expert_time import ExpertTime, ExpertTimeEstimate
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.planning.proposal import Proposal, Proposer, planned_load
from ep_rebalance.planning.step_work import StepWork, mean_work, step_work
from ep_rebalance.topology import Topology

RANKS, SNAPSHOT_STEPS, PLAN_SNAPSHOTS, AGAIN, REPEATS = 2, 4, 8, 8, 3
SHAPE = ModelShape(hidden=256, expert_intermediate=384)
CASES = (("few dense layers", 1), ("many dense layers", 24))
"""Name, and dense matrices of a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A step. Each in seconds: of the slowest ranks, summed over layers."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        return self.dense + self.experts


@dataclass(slots=True)
class Layers:
    """The layers of both ranks.

    dense: matrices of a layer that every token passes.
    """

    dense: int
    matrix_HH: torch.Tensor = field(init=False)
    up_EHI: torch.Tensor = field(init=False)
    down_EIH: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        hidden, inner, experts = SHAPE.hidden, SHAPE.expert_intermediate, SHAPE.experts
        self.matrix_HH = torch.randn(hidden, hidden) / hidden**0.5
        self.up_EHI = torch.randn(experts, hidden, 2 * inner) / hidden**0.5
        self.down_EIH = torch.randn(experts, inner, hidden) / inner**0.5

    def step(self, counts_LE: NDArray[np.int64], placement: Placement, tokens: int) -> Parts:
        """Compute one step.

        counts_LE: int64 [L, E]. Tokens of each expert.
        tokens: of each rank.
        """
        dense = experts = 0.0
        rows_TH = torch.randn(int(counts_LE.max()) + tokens, SHAPE.hidden)
        for counts_E, slots_P in zip(counts_LE, placement.slots_LP, strict=True):
            dense += max(self._dense(rows_TH[:tokens]) for _ in range(RANKS))
            by_rank = slots_P.reshape(RANKS, -1)
            experts += max(self._experts(rows_TH, counts_E, slots_S) for slots_S in by_rank)
        return Parts(dense=dense, experts=experts)

    def _dense(self, rows_TH: torch.Tensor) -> float:
        def compute() -> None:
            for _ in range(self.dense):
                rows_TH @ self.matrix_HH

        return _seconds(compute)

    def _experts(
        self, rows_TH: torch.Tensor, counts_E: NDArray[np.int64], experts_S: NDArray[np.int32]
    ) -> float:
        def compute() -> None:
            for expert in experts_S:
                gate, up = (rows_TH[: counts_E[expert]] @ self.up_EHI[expert]).chunk(2, dim=1)
                torch.nn.functional.silu(gate) * up @ self.down_EIH[expert]

        return _seconds(compute)


def _seconds(compute: Callable[[], None]) -> float:
    """The least of REPEATS."""
    taken = []
    for _ in range(REPEATS):
        began = time.thread_time()
        compute()
        taken.append(time.thread_time() - began)
    return min(taken)


@dataclass(slots=True)
class Seen:
    """What was measured.

    apart: (seconds of the experts, of the step), step by step.
    moved: (part by which the step was shorter, part by which the busiest ranks had fewer tokens).
    """

    samples: list[LoadSample] = field(default_factory=list)
    apart: list[tuple[float, float]] = field(default_factory=list)
    moved: list[tuple[float, float]] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)


def serve(layers: Layers, snapshots: int, seed: int) -> Seen:
    """Serve so many snapshots, of kinds of text that change."""
    config = load_config({"decision": {"min_gain_over_cost": 0.0}})
    proposer = Proposer(
        planner=planner_of("incremental"),
        settings=config.planner,
        decision=config.decision,
        migration=config.migration,
        cost=TokenCost(),
        topology=Topology.single_node(RANKS),
        expert_bytes_L=(SHAPE.expert_bytes,) * SHAPE.layers,
    )
    seen, generation, steps = Seen(), 0, _steps(seed)
    placement = Placement.contiguous(
        num_layers=SHAPE.layers, num_experts=SHAPE.experts, num_ranks=RANKS
    )
    for number in range(snapshots):
        sample = _snapshot(layers, placement, generation, steps, seen)
        seen.samples.append(sample)
        if number % PLAN_SNAPSHOTS == PLAN_SNAPSHOTS - 1:
            recent = seen.samples[-config.window.snapshots :]
            proposal = proposer.propose(
                recent,
                placement,
                unseen=PLAN_SNAPSHOTS,
                step_seconds=float(np.mean([one.step_seconds for one in recent])),
            )
            seen.proposals.append(proposal)
            if proposal.decision.accepted:
                placement, generation = proposal.plan.placement, generation + 1
    return seen


def _steps(seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(tokens of a rank, tokens of each expert [L, E]) of the steps; the kind of text changes."""
    rng = np.random.default_rng(seed)
    popularity_DLE = SHAPE.popularity_DLE()
    number = 0
    while True:
        tokens = int(rng.integers(128, 257))
        popularity_LE = popularity_DLE[number // (SNAPSHOT_STEPS * 6) % len(popularity_DLE)]
        pairs = tokens * RANKS * SHAPE.top_k
        yield tokens, np.array([rng.multinomial(pairs, share_E) for share_E in popularity_LE])
        number += 1


def _snapshot(
    layers: Layers,
    placement: Placement,
    generation: int,
    steps: Iterator[tuple[int, NDArray[np.int64]]],
    seen: Seen,
) -> LoadSample:
    counts_ALE = np.zeros((2, SHAPE.layers, SHAPE.experts), np.int64)
    seconds = 0.0
    for _ in range(SNAPSHOT_STEPS):
        tokens, counts_LE = next(steps)
        parts = layers.step(counts_LE, placement, tokens)
        counts_ALE[0] += counts_LE
        seconds += parts.total
        seen.apart.append((parts.experts, parts.total))
        if len(seen.apart) % AGAIN == 0:
            seen.moved.append(_moved(layers, counts_LE, tokens))
    return LoadSample(
        counts_ALE=counts_ALE,
        steps=SNAPSHOT_STEPS,
        step_seconds=seconds / SNAPSHOT_STEPS,
        generation=generation,
        placement=placement,
        quotas_LP=placement.even_quotas_LP(),
    )


def _moved(layers: Layers, counts_LE: NDArray[np.int64], tokens: int) -> tuple[float, float]:
    """What a step gains from a placement that evens out its own tokens, from that which an engine loads."""
    loaded = Placement.contiguous(
        num_layers=SHAPE.layers, num_experts=SHAPE.experts, num_ranks=RANKS
    )
    sample = LoadSample(counts_ALE=np.stack([counts_LE, 0 * counts_LE]), steps=1, step_seconds=0.0)
    load = planned_load(load_config({}).planner, [sample])
    even = place_anew(load, loaded, Topology.single_node(RANKS))
    busiest = [p.rank_load_LR(counts_LE).max(axis=1).sum() for p in (loaded, even)]
    before, after, again = (
        layers.step(counts_LE, placement, tokens).total for placement in (loaded, even, loaded)
    )
    return 1.0 - 2.0 * after / (before + again), 1.0 - busiest[1] / busiest[0]


def learned(seen: Seen) -> tuple[ExpertTime, StepWork]:
    """(what all snapshots tell at the load of those on the loaded placement, that load)."""
    asked = ExpertTimeEstimate("auto", cost=TokenCost(), phases=("prefill", "decode"))
    asked.add(seen.samples)
    works = [
        step_work(sample, TokenCost(), by_own_counts=False)
        for sample in seen.samples
        if sample.generation == 0
    ]
    first = mean_work([work for work in works if work is not None])
    return asked.at(first), first


def show(name: str, seen: Seen, console: Console) -> None:
    """Print what is true and what was learned."""
    told, _ = learned(seen)
    first = sum(sample.generation == 0 for sample in seen.samples) * SNAPSHOT_STEPS
    experts, total = np.sum(seen.apart[:first], axis=0)
    shorter, fewer = np.array(seen.moved).T
    slope = shorter.sum() / fewer.sum()
    error = np.std(shorter - slope * fewer) * len(fewer) ** 0.5 / fewer.sum()
    console.print(
        f"{name}: experts take {experts / total:.3f} of a step, timed apart; {slope:.3f} ± {error:.3f} "
        f"waits, by moving them; learned {told.fraction:.3f} ± {told.standard_error:.3f} ({told.source}), "
        f"from {len(seen.samples)} snapshots and {seen.samples[-1].generation} commits",
        soft_wrap=True,
        highlight=False,
    )
    for proposal in seen.proposals:
        measured = proposal.measured_gain
        console.print(
            f"   {proposal.decision.outcome}: predicted {proposal.decision.predicted_gain:.4f}, "
            f"waits {proposal.expert_time.text}, before it achieved {proposal.achieved_gain}, measured "
            + (
                "nothing"
                if measured is None
                else f"{measured.gain:.3f} ± {measured.standard_error:.3f}"
            ),
            style="dim",
            soft_wrap=True,
            highlight=False,
        )


def main() -> None:
    """Measure every case and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--snapshots", type=int, default=96, help="of four steps (default 96)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    console = Console()
    for name, dense in CASES:
        show(name, serve(Layers(dense), options.snapshots, options.seed), console)


if __name__ == "__main__":
    main()
