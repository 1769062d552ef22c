"""Phases: what redundant experts do to a decode step and to a prefill step, each on its own.

A rank reads each of its experts that gets a token, however few these are. In decode that often takes longer
than computing, and then a step takes longer with every redundant expert. In prefill computing takes longer,
and redundant experts even it out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.trace import RecordedSnapshot, TraceHead
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.run import Scenario
from ep_rebalance.offline.step_time import ModelledSteps, RankLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import cost_model


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStep:
    """The experts' part of the mean step with only one phase's tokens, spread over all recorded steps.

    phase: of PHASES.
    tokens_per_rank: of a step.
    reading_seconds: to read each expert that gets tokens once, evenly over the ranks.
    computing_seconds: to compute the tokens, evenly over the ranks.
    expert_seconds: of the busiest ranks, with experts placed for the whole recording.
    single_seconds: the same without redundant experts.
    """

    phase: str
    tokens_per_rank: float
    reading_seconds: float
    computing_seconds: float
    expert_seconds: float
    single_seconds: float

    @property
    def mostly_reads(self) -> bool:
        return self.reading_seconds > self.computing_seconds

    @property
    def longer(self) -> float:
        """By what fraction redundant experts make it longer; below 0 if they make it shorter."""
        return self.expert_seconds / self.single_seconds - 1.0

    def sentence(self, redundant_per_rank: float) -> str:
        """What the numbers say of an option."""
        bound = "reads weights" if self.mostly_reads else "computes"
        told = (
            f"{self.phase}, {self.tokens_per_rank:.0f} tokens a GPU: mostly {bound} "
            f"({1e3 * self.reading_seconds:.2g} ms to read, {1e3 * self.computing_seconds:.2g} ms to compute)"
        )
        if redundant_per_rank <= 0:
            return told
        change = "longer" if self.longer > 0 else "shorter"
        return (
            f"{told}, experts take {abs(self.longer):.1%} {change} with {redundant_per_rank:g} copies a GPU "
            "than with none"
        )


def phase_steps(
    head: TraceHead, mean: RecordedSnapshot, scenario: Scenario
) -> tuple[PhaseStep, ...]:
    """One for each phase that has tokens.

    mean: all snapshots of the trace as one.
    scenario: with ModelledSteps. Its ranks must divide its slots, and also the fewest that hold all experts.
    """
    ranks, redundant = scenario.topology.num_ranks, scenario.config.planner.redundant_experts
    served = _served(head, mean, scenario, redundant)
    single = _served(head, mean, scenario, -head.experts % ranks)
    return tuple(
        _phase_step(head, phase, _alone(mean, index), scenario, served, single)
        for index, phase in enumerate(PHASES)
        if mean.counts_ALE[index].any()
    )


def _alone(mean: RecordedSnapshot, phase: int) -> RecordedSnapshot:
    counts_ALE = np.zeros_like(mean.counts_ALE)
    counts_ALE[phase] = mean.counts_ALE[phase]
    return replace(mean, counts_ALE=counts_ALE)


def _served(
    head: TraceHead, mean: RecordedSnapshot, scenario: Scenario, redundant: int
) -> tuple[Placement, NDArray[np.float64]]:
    """The best placement for the recording as a whole, with its quotas."""
    assert isinstance(scenario.step_time, ModelledSteps)
    load = scenario.step_time.load_of(mean)
    contiguous = Placement.contiguous(
        num_layers=head.layers,
        num_experts=head.experts,
        num_ranks=scenario.topology.num_ranks,
        num_redundant=redundant,
    )
    placement = place_anew(load, contiguous, scenario.topology)
    return placement, cost_model(scenario.config).split(load, placement)


def _phase_step(
    head: TraceHead,
    phase: str,
    alone: RecordedSnapshot,
    scenario: Scenario,
    *served: tuple[Placement, NDArray[np.float64]],
) -> PhaseStep:
    times = scenario.step_time
    assert isinstance(times, ModelledSteps)
    counts_LE = alone.counts_ALE.sum(axis=0)
    own = scenario.config.dispatch.by_own_counts
    expert_seconds, single_seconds = (
        times.parts(alone, RankLoad.of(counts_LE, placement, quotas_LP, by_own_counts=own)).experts
        for placement, quotas_LP in served
    )
    reading_seconds, computing_seconds = times.even_seconds(times.load_of(alone))
    tokens = float(counts_LE.sum()) / (head.layers * head.top_k * max(alone.steps, 1))
    return PhaseStep(
        phase=phase,
        tokens_per_rank=tokens * times.load_factor / scenario.topology.num_ranks,
        reading_seconds=reading_seconds,
        computing_seconds=computing_seconds,
        expert_seconds=expert_seconds,
        single_seconds=single_seconds,
    )
