"""Decision: is a plan worth its migration?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ep_rebalance.config import DecisionConfig
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.pace import Pace, Transport, moved_bytes_L
from ep_rebalance.planning.problem import Plan

Outcome = Literal["accepted", "no_gain", "over_budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided, and the numbers to compare with what is achieved later.

    reason: one sentence that gives the numbers.
    predicted_gain: fraction of the step time. What the plan saves by its own account, times the trust in
        it; below 0 if it makes steps longer.
    predicted_saved_seconds: what that amounts to over the horizon, from the commit of each layer on.
    migration_seconds: how long the busiest rank's bytes take over its links, with what each round costs.
    pace: how the migration goes if the plan is accepted.
    """

    outcome: Outcome
    reason: str
    predicted_gain: float
    predicted_saved_seconds: float
    migration_seconds: float
    pace: Pace

    @property
    def accepted(self) -> bool:
        return self.outcome == "accepted"


def decide(
    plan: Plan,
    *,
    step_seconds: float,
    expert_time: ExpertTime,
    current: Placement,
    transport: Transport,
    config: DecisionConfig,
    trust: float = 1.0,
) -> Decision:
    """Accept `plan` if its gain is large enough, both by itself and for what its migration costs.

    step_seconds: mean time of an engine step.
    expert_time: what of it waits for the busiest ranks' experts.
    transport: what the experts go over.
    trust: 0 to 1. The fraction of earlier plans' promises that was kept.

    Each layer waits for its busiest rank, so the time that experts take in a step shrinks in the same
    proportion as the sum of the layers' imbalances. The rest of the step stays as it is. A layer saves
    nothing until it is committed.

    The gain by itself is held against `min_gain` with the least fraction that is likely (one standard error
    below the estimate), so that no experts move for what may be noise. Against the cost, for which the
    settings ask a multiple, it is the expected gain.
    """
    gain = expert_time.fraction * plan.promised * trust
    least = expert_time.least * plan.promised * trust
    pace = transport.pace(plan, current, gain)
    steps, cost = transport.cost(plan.placement, current, pace)
    paying = _paying_steps(plan, current, transport, pace, steps, config.horizon_steps)
    saved = gain * step_seconds * paying
    outcome, reason = _judge(plan, (gain, least), saved, (steps, cost), config)
    return Decision(
        outcome=outcome,
        reason=reason,
        predicted_gain=gain,
        predicted_saved_seconds=saved,
        migration_seconds=cost,
        pace=pace,
    )


def _paying_steps(
    plan: Plan, current: Placement, transport: Transport, pace: Pace, steps: int, horizon: int
) -> float:
    """Steps of the horizon that are left once a layer is committed, on average over the plan's gain.

    steps: how many the migration takes. Layers are taken to be committed as evenly as its bytes arrive.
    """
    layers = list(pace.layers)
    gain_K = (plan.imbalance_before_L - plan.imbalance_after_L)[layers]
    if gain_K.sum() <= 0.0:
        return float(horizon)
    arrived_K = moved_bytes_L(plan.placement, current, transport.expert_bytes_L)[layers].cumsum()
    left_K = np.maximum(horizon - steps * arrived_K / arrived_K[-1], 0.0)
    return float(gain_K @ left_K / gain_K.sum())


def _judge(
    plan: Plan,
    gains: tuple[float, float],
    saved: float,
    cost: tuple[int, float],
    config: DecisionConfig,
) -> tuple[Outcome, str]:
    """gains: expected, and the least that is likely; fractions of the step time. cost: steps and seconds."""
    gain, least = gains
    steps, seconds = cost
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
        f"{config.horizon_steps} steps, for {seconds:.3g} s of transfers in {steps} steps"
    )
    if not saved >= config.min_gain_over_cost * seconds:
        return (
            "over_budget",
            f"{numbers}, less than {config.min_gain_over_cost:g} times their cost.",
        )
    return "accepted", f"{numbers}."
