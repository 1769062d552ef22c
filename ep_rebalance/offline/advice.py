"""Advice: how many ranks, how many redundant experts, or no expert parallelism at all.

Each option is replayed over the same recorded load, with the plugin and without, and with as many more
tokens in a step as it has more ranks. Options are compared by tokens per second and rank. Experts that
are cut over all ranks instead (tensor parallelism) are always balanced; their price is an all-reduce of
every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_rebalance.load.trace import RecordedSnapshot, TraceHead
from ep_rebalance.offline.layouts import nothing_to_gain
from ep_rebalance.offline.phases import PhaseStep, phase_steps
from ep_rebalance.offline.report.words import counted
from ep_rebalance.offline.run import Replayed, Scenario
from ep_rebalance.offline.step_time import ModelledSteps, RankLoad, StepParts
from ep_rebalance.placement import Placement

_SHARE = 0.4
"""Something that takes more than this fraction of a layer's time is named as what the layer waits for."""
WORTH = 0.01
"""Rebalancing is called worth it if it saves at least this fraction of the step time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One option.

    expert_parallel: False if experts are cut over the ranks.
    ranks: GPUs.
    redundant: slots of a layer beyond one for each expert, on all ranks together.
    imbalance: max over mean rank load, with the plugin.
    home_share: fraction of the (token, expert) pairs that stay on their rank, with the plugin.
    node_share: fraction of them that stay on their node, or even on their rank.
    step_seconds: mean step, with the plugin if experts are not cut.
    unbalanced_step_seconds: mean step without the plugin.
    tokens_per_second: of all ranks together.
    weight_bytes: the experts on one rank.
    extra_bytes: the redundant ones among them.
    fits: whether the experts leave a tenth of the memory for everything else.
    moved_bytes_per_hour: over links.
    phases: what redundant experts do to decode and to prefill; none if experts are cut.
    reason: what the step waits for, and what rebalancing does about it.
    """

    expert_parallel: bool
    ranks: int
    redundant: int
    imbalance: float
    home_share: float
    node_share: float
    step_seconds: float
    unbalanced_step_seconds: float
    tokens_per_second: float
    weight_bytes: int
    extra_bytes: int
    fits: bool
    moved_bytes_per_hour: float
    phases: tuple[PhaseStep, ...]
    reason: str

    @property
    def tokens_per_second_and_rank(self) -> float:
        return self.tokens_per_second / self.ranks

    @property
    def saved(self) -> float:
        """Fraction of the step time that the plugin saves."""
        return 1.0 - self.step_seconds / self.unbalanced_step_seconds


def advise_expert_parallel(
    head: TraceHead, mean: RecordedSnapshot, ours: Replayed, none: Replayed, memory_bytes: float
) -> Advice:
    """Advice from two replays of the same size, with ModelledSteps.

    mean: all snapshots of the trace as one.
    ours, none: the replays with the plugin and without.
    memory_bytes: bytes. The memory of a rank.
    """
    scenario = ours.scenario
    times = _times(scenario)
    ranks, redundant = scenario.topology.num_ranks, scenario.config.planner.redundant_experts
    slots = (head.experts + redundant) // ranks
    weight_bytes = slots * sum(head.expert_bytes)
    extra = redundant * sum(head.expert_bytes) // ranks
    fits = weight_bytes < 0.9 * memory_bytes
    phases = phase_steps(head, mean, scenario)
    saved = 1.0 - ours.mean_step_seconds / none.mean_step_seconds
    reason = (
        _explain(head, mean, ours, times, saved, phases)
        if fits
        else f"the experts alone take {weight_bytes / memory_bytes:.0%} of a rank's memory"
    )
    return Advice(
        expert_parallel=True,
        ranks=ranks,
        redundant=redundant,
        imbalance=ours.mean_imbalance,
        home_share=ours.home_share,
        node_share=ours.node_share,
        step_seconds=ours.mean_step_seconds,
        unbalanced_step_seconds=none.mean_step_seconds,
        tokens_per_second=_tokens_per_step(head, mean) * times.load_factor / ours.mean_step_seconds,
        weight_bytes=weight_bytes,
        extra_bytes=extra,
        fits=fits,
        moved_bytes_per_hour=ours.moved_bytes / ours.hours,
        phases=phases,
        reason=reason,
    )


def advise_cut_experts(
    head: TraceHead, mean: RecordedSnapshot, scenario: Scenario, memory_bytes: float
) -> Advice:
    """Advice for the ranks of `scenario`, with every expert cut over all of them.

    mean: all snapshots of the trace as one.
    memory_bytes: bytes. The memory of a rank.
    """
    times = _times(scenario)
    ranks = scenario.topology.num_ranks
    parts = _cut_parts(head, mean, times)
    weight_bytes = head.experts * sum(head.expert_bytes) // ranks
    share = parts.transfers / (parts.experts + parts.transfers)
    return Advice(
        expert_parallel=False,
        ranks=ranks,
        redundant=0,
        imbalance=1.0,
        home_share=1.0,
        node_share=1.0,
        step_seconds=parts.total,
        unbalanced_step_seconds=parts.total,
        tokens_per_second=_tokens_per_step(head, mean) * times.load_factor / parts.total,
        weight_bytes=weight_bytes,
        extra_bytes=0,
        fits=weight_bytes < 0.9 * memory_bytes,
        moved_bytes_per_hour=0.0,
        phases=(),
        reason=f"experts cut over all ranks: always even, all-reduce takes {share:.0%} of the layers",
    )


def ranked(options: Sequence[Advice]) -> list[Advice]:
    """The options with the most tokens per second and rank first; those that do not fit last."""
    return sorted(options, key=lambda a: (not a.fits, -a.tokens_per_second_and_rank))


def _times(scenario: Scenario) -> ModelledSteps:
    assert isinstance(scenario.step_time, ModelledSteps)
    return scenario.step_time


def _tokens_per_step(head: TraceHead, mean: RecordedSnapshot) -> float:
    pairs = float(mean.counts_ALE.sum())
    return pairs / (head.layers * head.top_k * max(mean.steps, 1))


def _cut_parts(head: TraceHead, mean: RecordedSnapshot, times: ModelledSteps) -> StepParts:
    """Seconds of a step with cut experts. Each rank computes a part of every activated expert."""
    ranks = times.topology.num_ranks
    one = Placement.contiguous(num_layers=head.layers, num_experts=head.experts, num_ranks=1)
    whole = RankLoad.of(mean.counts_ALE.sum(axis=0), one, one.even_quotas_LP())
    experts = times.parts(mean, whole).experts / ranks
    tokens = _tokens_per_step(head, mean) * times.load_factor
    slowest = times.hardware.internode if times.topology.num_nodes > 1 else times.hardware.intranode
    # A ring all-reduce sends 2 (R - 1) / R of the data from each rank; 2 bytes a number (bfloat16).
    sent = 2.0 * (ranks - 1) / ranks * tokens * head.hidden_size * 2.0
    return StepParts(
        experts=experts,
        transfers=head.layers * sent / slowest,
        rest=_contiguous_parts(
            head, mean, times
        ).rest,  # attention and the like, as with whole experts
    )


def _contiguous_parts(
    head: TraceHead, mean: RecordedSnapshot, times: ModelledSteps, redundant: int | None = None
) -> StepParts:
    ranks = times.topology.num_ranks
    extra = -head.experts % ranks if redundant is None else redundant
    placement = Placement.contiguous(
        num_layers=head.layers, num_experts=head.experts, num_ranks=ranks, num_redundant=extra
    )
    served = RankLoad.of(mean.counts_ALE.sum(axis=0), placement, placement.even_quotas_LP())
    return times.parts(mean, served)


def _what_rebalancing_does(ours: Replayed, saved: float) -> str:
    if saved >= WORTH:
        return f"rebalancing saves {saved:.1%}"
    size = ours.scenario.topology.num_ranks, ours.scenario.config.planner.redundant_experts
    if fixed := nothing_to_gain(ours.replicas_LE.shape[1], *size):
        return f"rebalancing saves nothing: {fixed}"
    if not ours.plans:
        return "the trace is too short for a migration to end: record longer or let more bytes move"
    if saved < 0:
        return f"rebalancing makes steps {-saved:.1%} longer: leave it off"
    return f"rebalancing saves {saved:.1%}: hardly worth it"


def _explain(
    head: TraceHead,
    mean: RecordedSnapshot,
    ours: Replayed,
    times: ModelledSteps,
    saved: float,
    phases: Sequence[PhaseStep],
) -> str:
    """What rebalancing does, and what the option waits for."""
    ranks = times.topology.num_ranks
    redundant = ours.scenario.config.planner.redundant_experts
    slots = (head.experts + redundant) // ranks
    parts = _contiguous_parts(head, mean, times, redundant)
    causes = [_what_rebalancing_does(ours, saved)]
    load_LE = mean.counts_ALE.sum(axis=0)
    hottest = float((load_LE.max(axis=1) / (load_LE.sum(axis=1) / ranks)).mean())
    # One expert can have more load than a rank should: no placement helps then, only replicas or fewer ranks.
    if ours.mean_imbalance > 1.15:
        causes.append(
            f"{counted(slots, 'expert')} a rank: the hottest one alone is {hottest:.2f} of a rank's mean load"
        )
    share = parts.transfers / (parts.experts + parts.transfers)
    if share > _SHARE:
        causes.append(f"all-to-all takes {share:.0%} of the layers")
    copies = slots - -(-head.experts // ranks)
    causes += [phase.sentence(copies) for phase in phases]
    return "; ".join(causes)
