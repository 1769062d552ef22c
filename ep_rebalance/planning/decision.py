"""Decision: is a plan worth its migration?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ep_rebalance.config import DecisionConfig
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.problem import Plan
from ep_rebalance.planning.sources import choose_sources
from ep_rebalance.topology import Topology

Outcome = Literal["accepted", "no_gain", "over_budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided, and the numbers to compare with what is achieved later.

    reason: one sentence that gives the numbers.
    predicted_gain: fraction of the step time. What the plan saves by its own account, times the trust in
        it; below 0 if it makes steps longer.
    predicted_saved_seconds: what that amounts to over the horizon.
    migration_seconds: how long the busiest rank's bytes take over its links.
    """

    outcome: Outcome
    reason: str
    predicted_gain: float
    predicted_saved_seconds: float
    migration_seconds: float

    @property
    def accepted(self) -> bool:
        return self.outcome == "accepted"


def decide(
    plan: Plan,
    *,
    step_seconds: float,
    expert_time: ExpertTime,
    expert_bytes_L: Sequence[int],
    current: Placement,
    topology: Topology,
    config: DecisionConfig,
    trust: float = 1.0,
) -> Decision:
    """Accept `plan` if its gain is large enough, both by itself and for what its migration costs.

    step_seconds: mean time of an engine step.
    expert_time: what of it waits for the busiest ranks' experts.
    expert_bytes_L: L sizes, bytes. One expert of each layer.
    trust: 0 to 1. The fraction of earlier plans' promises that was kept.

    Each layer waits for its busiest rank, so the time that experts take in a step shrinks in the same
    proportion as the sum of the layers' imbalances. The rest of the step stays as it is.

    The gain by itself is held against `min_gain` with the least fraction that is likely (one standard error
    below the estimate), so that no experts move for what may be noise. Against the cost, for which the
    settings ask a multiple, it is the expected gain.
    """
    gain = expert_time.fraction * plan.promised * trust
    least = expert_time.least * plan.promised * trust
    saved = gain * step_seconds * config.horizon_steps
    cost = migration_seconds(plan.placement, current, topology, expert_bytes_L)
    outcome, reason = _judge(plan, (gain, least), saved, cost, config)
    return Decision(
        outcome=outcome,
        reason=reason,
        predicted_gain=gain,
        predicted_saved_seconds=saved,
        migration_seconds=cost,
    )


def migration_seconds(
    target: Placement, current: Placement, topology: Topology, expert_bytes_L: Sequence[int]
) -> float:
    """How long the busiest rank sends, or receives, if nothing else is on its links."""
    fetches = choose_sources(
        current,
        target,
        layers=range(current.num_layers),
        topology=topology,
        expert_bytes_L=expert_bytes_L,
    )
    bytes_F = np.array(expert_bytes_L)[fetches.layer]
    seconds_F = bytes_F / np.array(topology.bytes_per_second)[fetches.link]
    ranks, sent_F = current.num_ranks, ~fetches.over("local")
    receiving_R = np.bincount(fetches.dst_rank, seconds_F, minlength=ranks)
    sending_R = np.bincount(fetches.src_rank[sent_F], seconds_F[sent_F], minlength=ranks)
    return float(max(sending_R.max(), receiving_R.max()))


def _judge(
    plan: Plan, gains: tuple[float, float], saved: float, cost: float, config: DecisionConfig
) -> tuple[Outcome, str]:
    """gains: expected, and the least that is likely; fractions of the step time."""
    gain, least = gains
    if not plan.moved_slots:
        return "no_gain", "The planner found no move that pays for itself."
    if not least >= config.min_gain:  # also if it is not a number
        likely = f" ({least:.2%} at least)" if least < gain else ""
        return "no_gain", (
            f"Moving {plan.moved_slots} slots would save {gain:.2%}{likely} of the step time, "
            f"less than the {config.min_gain:.2%} that is acted on."
        )
    numbers = (
        f"Moving {plan.moved_slots} slots would save {gain:.2%} of the step time, {saved:.3g} s over "
        f"{config.horizon_steps} steps, for {cost:.3g} s of transfers"
    )
    if not saved >= config.min_gain_over_cost * cost:
        return (
            "over_budget",
            f"{numbers}, less than {config.min_gain_over_cost:g} times their cost.",
        )
    return "accepted", f"{numbers}."
