"""Proposal: from the window to a plan, and the decision whether to carry it out.

The same code runs in the server and in a replay. It remembers the loads and step times from before the
window, and the last plan, so that later windows can tell whether that plan kept its promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ep_rebalance.config import DecisionConfig, MigrationConfig, PlannerConfig
from ep_rebalance.load.history import LoadHistory
from ep_rebalance.load.window import LoadSample, WindowLoad, window_load
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import CostModel
from ep_rebalance.planning.decision import Decision, decide
from ep_rebalance.planning.expert_time import ExpertTime, ExpertTimeEstimate
from ep_rebalance.planning.measured_gain import MeasuredGain, StepHistory
from ep_rebalance.planning.pace import Transport
from ep_rebalance.planning.policies import make_plan
from ep_rebalance.planning.problem import Budget, Plan, Planner, Problem
from ep_rebalance.planning.step_work import StepWork
from ep_rebalance.planning.track_record import Promise, TrackRecord
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A plan and the decision on it.

    achieved_gain: fraction of the step time. What the last committed plan saved, compared with the
        placement before it, by the cost of load that it had not seen; None if nothing new is known.
    measured_gain: the same by the server's own step times; None while these do not tell.
    trust: 0 to 1. The fraction of the plan's promise that the decision believed.
    refused: what of earlier outcomes was not finite and so was not learned from, as a clause; "" if nothing.
    expert_time: what of the step waits for the busiest ranks' experts, as the decision took it.
    """

    plan: Plan
    decision: Decision
    expert_time: ExpertTime
    achieved_gain: float | None
    measured_gain: MeasuredGain | None
    trust: float
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedProposal:
    """A proposal and how many seconds it took."""

    proposal: Proposal
    seconds: float


class Proposer:
    """Makes one proposal after another, and learns from each what the next one is worth.

    by_own_counts: whether each step's own tokens are spread evenly over the replicas.
    """

    def __init__(
        self,
        *,
        planner: Planner,
        settings: PlannerConfig,
        decision: DecisionConfig,
        migration: MigrationConfig,
        cost: CostModel,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        by_own_counts: bool = False,
    ) -> None:
        self._planner = planner
        self._settings = settings
        self._decision = decision
        self._migration = migration
        self._cost = cost
        self._topology = topology
        self._expert_bytes_L = expert_bytes_L
        self._memory = LoadHistory()
        self._record = TrackRecord()
        self._steps = StepHistory()
        self._expert_times = ExpertTimeEstimate(
            decision.expert_time_fraction,
            cost=cost,
            phases=settings.phases,
            by_own_counts=by_own_counts,
        )
        self._promise: Promise | None = None
        self._judged: Promise | None = None

    def propose(
        self,
        samples: Sequence[LoadSample],
        current: Placement,
        *,
        unseen: int,
        step_seconds: float,
    ) -> Proposal:
        """A plan from `samples`, and the decision on it.

        samples: oldest first.
        unseen: how many of the newest samples came after the plan before.
        step_seconds: mean time of an engine step in the window.
        """
        newest = samples[len(samples) - unseen :]
        later = window_load(newest, phases=self._settings.phases) if newest else None
        self._expert_times.add(newest)
        achieved, refused = self._learn(later, current)
        self._steps.add(newest)
        measured = self._measure(current)
        problem = self._problem(samples, current)
        plan = make_plan(self._planner, problem)
        plan.check(current)
        if later is not None:
            self._memory.add(later)
        work = self._expert_times.latest
        expert_time = self._expert_times.at(work)
        decision = decide(
            plan,
            step_seconds=step_seconds,
            expert_time=expert_time,
            current=current,
            transport=self._transport(samples),
            config=self._decision,
            trust=self._record.trust,
        )
        if decision.accepted:
            self._promise = _promise(problem, plan, work)
        return Proposal(
            plan=plan,
            decision=decision,
            expert_time=expert_time,
            achieved_gain=achieved,
            measured_gain=measured,
            trust=self._record.trust,
            refused=refused,
        )

    def _learn(self, load: WindowLoad | None, current: Placement) -> tuple[float | None, str]:
        """Judge the last plan by the load that came after it, if it was carried out.

        Returns the gain, or None if there is nothing to judge, and what was refused of it.
        """
        promise, self._promise = self._promise, None
        if promise is None or promise.after != current or load is None or not load.load_LE.any():
            self._record = self._record.faded()
            return None, ""
        achieved = promise.achieved(load, self._cost)
        self._record = self._record.with_outcome(promise.predicted, achieved)
        if not math.isfinite(achieved):
            return None, f"the last plan achieved {achieved} by later load"
        self._judged = promise
        return self._expert_times.at(promise.work).fraction * achieved, ""

    def _measure(self, current: Placement) -> MeasuredGain | None:
        """Judge the plan that is served by the step times before and after its commit."""
        promise = self._judged
        if promise is None or promise.after != current:
            return None
        measured = self._steps.gain()
        if measured is not None:
            # As is known by now: what is learned of the experts' time is no fault of the planner.
            fraction = self._expert_times.at(promise.work).fraction
            promised = fraction * promise.predicted
            self._record = self._record.with_measured(measured.part_kept(promised))
        return measured

    def _transport(self, samples: Sequence[LoadSample]) -> Transport:
        timed = [sample.step_seconds for sample in samples if sample.step_seconds]
        return Transport(
            settings=self._migration,
            topology=self._topology,
            expert_bytes_L=self._expert_bytes_L,
            step_seconds=median(timed) if timed else 0.0,
        )

    def _problem(self, samples: Sequence[LoadSample], current: Placement) -> Problem:
        settings = self._settings
        recent = planned_load(settings, samples)
        return Problem(
            load=self._memory.joined(recent, settings.remembered_share),
            current=current,
            topology=self._topology,
            budget=plan_budget(settings, current),
            cost=self._cost,
            internode_token_price=settings.internode_token_price,
            seed=settings.seed,
            threads=settings.threads,
        )


def planned_load(settings: PlannerConfig, samples: Sequence[LoadSample]) -> WindowLoad:
    """The load of `samples`, oldest first. Quotas are fitted to it; plans also see what is remembered."""
    return window_load(samples, phases=settings.phases, half_life=settings.half_life_snapshots)


def plan_budget(settings: PlannerConfig, current: Placement) -> Budget:
    """The budget of one plan; it allows at least one swap, however few slots there are."""
    slots = current.slots_LP.size
    return Budget(
        max_moved_slots=max(2, int(slots * settings.max_moved_fraction)),
        max_arrivals=settings.max_arrivals_per_rank_and_layer,
    )


def _promise(problem: Problem, plan: Plan, work: StepWork | None) -> Promise:
    return Promise(
        before=problem.current,
        before_quotas_LP=plan.unmoved_quotas_LP,
        after=plan.placement,
        after_quotas_LP=plan.quotas_LP,
        predicted=plan.promised,
        work=work,
    )
