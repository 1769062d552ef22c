"""Drives the server's loop from a trace, one snapshot at a time.

What takes a server many engine steps is done in one go here: experts are in their new slots as soon as
the server would have moved them all. Given a server's trace and configuration, the loop arrives at the
placements that this server served.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.balancer.asks import (
    Ask,
    FitQuotas,
    Migrate,
    NextSnapshot,
    Propose,
    ServeLoaded,
    TakeRounds,
    TakeUpQuotas,
    Tell,
    WorkOutRounds,
    drive,
)
from ep_rebalance.balancer.loop import BalancingLoop
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.snapshot import Agreed, Snapshot
from ep_rebalance.load.trace import MigrationEnd, RecordedSnapshot
from ep_rebalance.migration import Migration
from ep_rebalance.migration.configured import schedule_as_configured
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import cost_model
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.proposal import Proposal, Proposer, planned_load
from ep_rebalance.telemetry.events import PlanEnded
from ep_rebalance.topology import LINKS, Link, Topology

Steps = Generator[None, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMade:
    """A plan and what became of it.

    step: the engine's step in which it was asked for.
    outcome: see `ep_rebalance_plans_total`.
    predicted_gain: fraction of the step time.
    expert_time: what of a step was taken to wait for experts.
    generation: the number under which it was served; None if it was not.
    served_at: the engine's step from which it was served.
    moved: experts that changed their slot.
    bytes: bytes over each kind of link that was used.
    layers: layers in which experts moved.
    placement: what was served; None if nothing changed.
    stall_seconds: how long the engine stood still for bytes on their way, by the topology's figures.
    serial_transfers: transfers that the busiest rank of a layer makes one after another, summed over layers;
        None where experts travel in rounds.
    """

    step: int
    outcome: str
    reason: str
    predicted_gain: float
    expert_time: ExpertTime
    generation: int | None = None
    served_at: int | None = None
    moved: int = 0
    bytes: dict[Link, int]
    layers: tuple[int, ...] = ()
    placement: Placement | None = None
    stall_seconds: float = 0.0
    serial_transfers: int | None = None


class ReplayedServer:
    """A server without an engine.

    served: what it begins with.
    loaded: what its engine loaded.
    as_recorded: whether plans, rounds and quotas are ready at the snapshots at which the recorded server's
        were, and an operator's requests are repeated. Otherwise each is ready at the next snapshot, and
        nobody requests anything.

    placement, quotas_LP: what the last snapshot was served with.
    plans: all plans so far.
    """

    def __init__(
        self,
        config: RebalanceConfig,
        *,
        proposer: Proposer,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        served: Served,
        loaded: Placement,
        as_recorded: bool = False,
    ) -> None:
        self.plans: list[PlanMade] = []
        self.placement, self.quotas_LP = served.placement, served.quotas_LP
        self._config = config
        self._proposer = proposer
        self._cost = cost_model(config)
        self._topology = topology
        self._expert_bytes_L = expert_bytes_L
        self._as_recorded = as_recorded
        self._loaded = Served.initial(loaded)
        self._served = served
        self._loop = BalancingLoop(config, replicated=loaded.num_redundant > 0)
        self._incoming: RecordedSnapshot | None = None
        self._step = self._planned_at = self._recorded_generation = 0
        self._proposal: Proposal | None = None
        self._migration: Migration | None = None
        self._fitted_LP: NDArray[np.float64] | None = None
        self._planning = self._scheduling = (
            False  # from its begin until a snapshot says that it is done
        )
        self._driver = drive(self._loop.run(), self._answer)
        next(self._driver)

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """Serve one more recorded snapshot."""
        self._incoming = snapshot if self._incoming is None else self._incoming.joined(snapshot)
        next(self._driver)

    # What follows is advanced by `snapshot`; a bare `yield` waits for the next one.

    def _answer(self, asked: Ask[Any]) -> Generator[None, None, Any]:
        match asked:
            case NextSnapshot():
                return (yield from self._next())
            case FitQuotas(samples):
                load = planned_load(self._config.planner, samples)
                self._fitted_LP = self._cost.split(load, self._served.placement)
            case TakeUpQuotas():
                assert self._fitted_LP is not None, "the loop had them fitted"
                self._served = self._served.with_quotas(self._fitted_LP)
            case ServeLoaded(layers):
                self._served = self._served.reloaded(layers, self._loaded)
            case Propose():
                self._propose(asked)
            case WorkOutRounds():
                self._work_out_rounds()
            case TakeRounds():
                return self._migration
            case Migrate():
                yield from self._migrate()
            case Tell(PlanEnded(outcome, reason)):
                self._note(outcome, reason)
        # Other events concern the status, and a replay has none.
        return None

    def _next(self) -> Generator[None, None, Snapshot]:
        # The snapshot in which a migration ended is still there: it was served with the new placement.
        if self._incoming is None:
            yield
        assert self._incoming is not None
        recorded, self._incoming = self._incoming, None
        self._recorded_generation = recorded.generation
        self._step = recorded.step
        self.placement, self.quotas_LP = self._served.placement, self._served.quotas_LP
        # Generations are those of the replay, which may have come to other placements.
        numbered = replace(recorded, generation=self._served.generation)
        sample = numbered.sample(self.placement, self.quotas_LP)
        agreed = self._agreed(recorded.agreed)
        if agreed.planned and self._planning:
            self._planning = False
            self._note_unless_proposed(agreed)
        return Snapshot(sample=sample, agreed=agreed)

    def _agreed(self, recorded: Agreed) -> Agreed:
        accepted = self._proposal is not None and self._proposal.decision.accepted
        if self._as_recorded:
            # Without a plan of its own the replay has nothing to carry out, whatever the server did.
            return replace(recorded, proposed=recorded.proposed and accepted)
        scheduled, self._scheduling = self._scheduling, False
        return Agreed(
            planned=self._planning,
            proposed=self._planning and accepted,
            scheduled=scheduled,
            fitted=True,
            replaced=recorded.replaced,
            reloaded=recorded.reloaded,
        )

    def _note_unless_proposed(self, agreed: Agreed) -> None:
        assert self._proposal is not None
        decision = self._proposal.decision
        if not decision.accepted:
            self._note(decision.outcome, decision.reason)
        elif not agreed.proposed:
            self._note("failed", "the recorded server had no such plan")

    def _propose(self, asked: Propose) -> None:
        self._planned_at, self._planning = self._step, True
        self._proposal = self._proposer.propose(
            asked.samples,
            self._served.placement,
            unseen=asked.unseen,
            step_seconds=asked.step_seconds,
        )

    def _work_out_rounds(self) -> None:
        assert self._proposal is not None
        self._scheduling = True
        self._migration = schedule_as_configured(
            self._config,
            self._served.placement,
            self._proposal.plan.placement,
            self._proposal.plan.quotas_LP,
            topology=self._topology,
            expert_bytes_L=self._expert_bytes_L,
            pace=self._proposal.decision.pace,
        )

    def _migrate(self) -> Steps:
        migration = self._migration
        assert migration is not None
        end = yield from self._end_of(migration)
        served = _after(self._served, migration, end.batches)
        if not end.abandoned:
            served = served.with_quotas(migration.quotas_LP)
        self._served = served.numbered(migration.source)
        self._note_migration(migration, end)

    def _end_of(self, migration: Migration) -> Generator[None, None, MigrationEnd]:
        """A server takes no snapshot while experts move: those that come meanwhile are joined.

        A snapshot is served with the batches whose last step falls into it, or fell before it. The recorded
        server's comes in two parts: what was computed before the commits, under the old number, and the rest.
        """
        first_part = self._as_recorded
        last_step_B = np.cumsum([len(batch.rounds) for batch in migration.batches])
        while True:
            yield
            assert self._incoming is not None
            if self._as_recorded and self._incoming.ended is not None:
                return self._incoming.ended
            first_part = first_part and self._incoming.generation == self._recorded_generation
            batches = int(np.searchsorted(last_step_B, self._incoming.steps, side="right"))
            batches = 0 if first_part else batches
            if batches == len(migration.batches):
                return MigrationEnd(batches=batches, abandoned=False)
            so_far = _after(self._served, migration, batches)
            self.placement, self.quotas_LP = so_far.placement, so_far.quotas_LP
            first_part = False

    def _note(self, outcome: str, reason: str) -> None:
        assert self._proposal is not None
        self.plans.append(
            PlanMade(
                step=self._planned_at,
                outcome=outcome,
                reason=reason,
                predicted_gain=self._proposal.decision.predicted_gain,
                expert_time=self._proposal.expert_time,
                bytes={},
            )
        )

    def _note_migration(self, migration: Migration, end: MigrationEnd) -> None:
        assert self._proposal is not None
        assert self._incoming is not None
        decision = self._proposal.decision
        committed = migration.batches[: end.batches]
        reason = "the recorded server abandoned it" if end.abandoned else decision.reason
        if end.abandoned and not committed:
            self._note("abandoned", reason)
            return
        bytes_of = {
            link: sum(batch.num_bytes(link) for batch in committed) for link in sorted(LINKS)
        }
        self.plans.append(
            PlanMade(
                step=self._planned_at,
                outcome="abandoned" if end.abandoned else "committed",
                reason=reason,
                predicted_gain=decision.predicted_gain,
                expert_time=self._proposal.expert_time,
                generation=self._served.generation,
                served_at=self._incoming.step,
                moved=sum(len(batch.moves) for batch in committed),
                bytes={link: size for link, size in bytes_of.items() if size},
                layers=_layers(migration, end.batches),
                placement=self._served.placement,
                stall_seconds=round_seconds(migration, end.batches, self._topology),
            )
        )


def round_seconds(migration: Migration, batches: int, topology: Topology) -> float:
    """How long the rounds of the first batches take: each as long as its busiest rank sends, or receives, and
    what a round takes beside its bytes.
    """
    # Rounds also carry moves of later batches.
    moves = [batch.moves for batch in migration.batches]
    link_M, src_M, dst_M = (
        np.concatenate(columns)
        for columns in zip(*((m.link, m.src_rank, m.dst_rank) for m in moves), strict=True)
    )
    rates, ranks, seconds = np.array(topology.bytes_per_second), topology.num_ranks, 0.0
    for batch in migration.batches[:batches]:
        rounds = batch.rounds
        round_X = np.repeat(np.arange(len(rounds)), np.diff(rounds.first_N1))
        seconds_X = (rounds.stop - rounds.start) / rates[link_M[rounds.move]]
        longest_N = np.zeros(len(rounds))
        for rank_M in (src_M, dst_M):
            cells_X = round_X * ranks + rank_M[rounds.move]
            sums = np.bincount(cells_X, seconds_X, minlength=len(rounds) * ranks)
            longest_N = np.maximum(longest_N, sums.reshape(len(rounds), -1).max(axis=1))
        seconds += float(longest_N.sum()) + len(rounds) * topology.round_seconds
    return seconds


def _layers(migration: Migration, batches: int) -> tuple[int, ...]:
    """Those of the first batches."""
    return tuple(layer for batch in migration.batches[:batches] for layer in batch.layers)


def _after(served: Served, migration: Migration, batches: int) -> Served:
    """What is served once so many batches are committed."""
    layers = _layers(migration, batches)
    placement = migration.source.replaced(layers, migration.target)
    return served.with_layers(layers, placement, migration.quotas_LP)
