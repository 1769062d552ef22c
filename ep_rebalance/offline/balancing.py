"""The server's own stages - window, planner, decision, migration, quotas - run over snapshots that are
given to them.

`ReplayedBalancer` plans when it is told to and serves a plan at once. `ReplayedServer` is the loop of
`balancer/rebalancer.py` with one `yield` per snapshot: it plans when the server would, and serves a plan when
the server would have moved its experts. Given a server's trace and configuration it comes to the
placements that the server committed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.load.window import LoadSample, LoadWindow
from ep_rebalance.migration import Migration, schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import CostModel
from ep_rebalance.planning.policies import staging_slots
from ep_rebalance.planning.problem import Planner
from ep_rebalance.planning.proposal import Proposal, Proposer, planned_load
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import LINKS, Link, Topology

Steps = Generator[None, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMade:
    """A plan and what became of it.

    step: the engine's, when it was made. outcome: as in `ep_rebalance_plans_total`. generation: that
    it was served under, None if it was not. served_at: the engine's step from which it was. moved:
    experts that changed their slot. bytes: over each kind of link that was used. layers: those in
    which experts moved. predicted_gain: part of the step time. seconds: that the planner took.
    """

    step: int
    outcome: str
    reason: str
    predicted_gain: float
    generation: int | None = None
    served_at: int | None = None
    moved: int = 0
    bytes: dict[Link, int]
    layers: tuple[int, ...] = ()
    placement: Placement | None = None


class ReplayedBalancer:
    """One model's balancer without an engine. Serves `placement` with `quotas_LP`."""

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        planner: Planner,
        cost: CostModel,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        placement: Placement,
    ) -> None:
        self.placement = placement
        self.quotas_LP: NDArray[np.float64] = placement.even_quotas_LP()
        self.window = LoadWindow(config.window.snapshots)
        self._settings = config.planner
        self._proposer = Proposer(
            planner=planner,
            settings=config.planner,
            decision=config.decision,
            cost=cost,
            topology=topology,
            expert_bytes_L=expert_bytes_L,
        )

    def append(self, sample: LoadSample) -> None:
        """One more snapshot; the quotas follow it. An idle one changes nothing."""
        self.window.append(sample)
        if sample.routed:
            self._refresh_quotas()

    def propose(self) -> Proposal:
        """Plan from the window."""
        unseen = self.window.begin_plan()
        return self._proposer.propose(
            self.window.samples(),
            self.placement,
            unseen=unseen,
            step_seconds=self.window.step_seconds,
        )

    def serve(self, placement: Placement) -> None:
        """Serve another placement from now on."""
        self.placement = placement
        self._refresh_quotas()

    def plan(self) -> Proposal:
        """Plan from the window, and serve the plan if it is accepted."""
        proposal = self.propose()
        if proposal.decision.accepted:
            self.serve(proposal.plan.placement)
        return proposal

    def _refresh_quotas(self) -> None:
        load = planned_load(self._settings, self.window.samples())
        self.quotas_LP = split_quotas(self.placement, load.load_LE)


class ReplayedServer:
    """A server's loop, one snapshot at a time.

    as_recorded: plans and rounds are done at the snapshots at which the recorded server's were; else a
    plan is ready when the next snapshot comes, and its rounds with the one after.
    placement, quotas_LP: what the last snapshot was served with. plans: all so far.
    """

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        planner: Planner,
        cost: CostModel,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        placement: Placement,
        generation: int = 0,
        as_recorded: bool = False,
    ) -> None:
        self.plans: list[PlanMade] = []
        self.placement, self.quotas_LP = placement, placement.even_quotas_LP()
        self._generation = generation
        self._config = config
        self._topology = topology
        self._expert_bytes_L = expert_bytes_L
        self._as_recorded = as_recorded
        self._balancer = ReplayedBalancer(
            config=config,
            planner=planner,
            cost=cost,
            topology=topology,
            expert_bytes_L=expert_bytes_L,
            placement=placement,
        )
        self._incoming: RecordedSnapshot | None = None
        self._loop = self._run()
        next(self._loop)

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """One more snapshot was counted."""
        self._incoming = snapshot
        next(self._loop)

    # The loop, in the order of `Rebalancer`. A bare `yield` waits for the next snapshot.

    def _run(self) -> Steps:
        while True:
            yield from self._until_plan_is_due()
            proposal, step = self._balancer.propose(), self._step
            while not (yield from self._snapshot()).planned and self._as_recorded:
                pass
            if not proposal.decision.accepted:
                self._note(step, proposal, proposal.decision.outcome, proposal.decision.reason)
                continue
            migration = self._schedule(proposal)
            while not (yield from self._snapshot()).scheduled and self._as_recorded:
                pass
            yield from self._migrate(step, proposal, migration)

    def _until_plan_is_due(self) -> Steps:
        config, window = self._config, self._balancer.window
        while True:
            yield from self._snapshot()
            if config.planner.policy != "none" and window.plan_is_due(
                config.window, config.planner.interval_snapshots
            ):
                return

    def _snapshot(self) -> Generator[None, None, RecordedSnapshot]:
        if self._incoming is None:
            yield
        assert self._incoming is not None
        snapshot, self._incoming = self._incoming, None
        self._step = snapshot.step
        self.placement, self.quotas_LP = self._balancer.placement, self._balancer.quotas_LP
        self._balancer.append(replace(snapshot, generation=self._generation).sample())
        return snapshot

    def _schedule(self, proposal: Proposal) -> Migration:
        placement = self._balancer.placement
        return schedule(
            placement,
            proposal.plan.placement,
            proposal.plan.quotas_LP,
            topology=self._topology,
            expert_bytes_L=self._expert_bytes_L,
            max_bytes_per_round=self._config.migration.max_bytes_per_step,
            staging_slots=staging_slots(self._config.planner, placement.slots_per_rank),
        )

    def _migrate(self, step: int, proposal: Proposal, migration: Migration) -> Steps:
        """The snapshot in which the last round falls is served with the new placement."""
        limit = self._config.migration.deadline_steps
        if migration.num_steps > limit:
            reason = f"moving takes {migration.num_steps} steps, more than {limit}"
            self._note(step, proposal, "over_budget", reason)
            return
        left = migration.num_steps
        while True:
            yield
            assert self._incoming is not None
            left -= self._incoming.steps
            if left <= 0:
                break
            yield from self._snapshot()
        self._step = self._incoming.step
        if migration.target != migration.source:
            self._generation += 1
        self._balancer.serve(migration.target)
        self._note(step, proposal, "committed", proposal.decision.reason, migration)

    def _note(
        self,
        step: int,
        proposal: Proposal,
        outcome: str,
        reason: str,
        migration: Migration | None = None,
    ) -> None:
        committed = {}
        if migration is not None:
            links = [link for link in sorted(LINKS) if migration.num_bytes(link)]
            committed = {
                "generation": self._generation,
                "served_at": self._step,
                "moved": migration.num_moves,
                "bytes": {link: migration.num_bytes(link) for link in links},
                "layers": tuple(layer for batch in migration.batches for layer in batch.layers),
                "placement": migration.target,
            }
        made = {"bytes": {}, **committed}
        self.plans.append(
            PlanMade(
                step=step,
                outcome=outcome,
                reason=reason,
                predicted_gain=proposal.decision.predicted_gain,
                **made,  # type: ignore[arg-type]
            )
        )
