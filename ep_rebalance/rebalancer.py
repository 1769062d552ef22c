"""The loop that ties the stages together: a generator that is advanced once per engine step on
every rank.

Every collective in it happens in the same step on every rank, because each branch is taken on
values that were summed or broadcast before. What takes long runs in `background.py`; ranks learn in
the next snapshot that it is done.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.background import Background, Proposal, plan_to_wire
from ep_rebalance.commit import Served, commit_batch, commit_tables
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.counts import DeviceCounts
from ep_rebalance.journal import Journal
from ep_rebalance.load_window import LoadWindow
from ep_rebalance.metrics import Status
from ep_rebalance.migration import Batch, Migration, schedule
from ep_rebalance.placement import Placement
from ep_rebalance.snapshot import Flags, Snapshot, SnapshotExchange
from ep_rebalance.state import ModelIdentity
from ep_rebalance.topology import Topology
from ep_rebalance.transport.expert_memory import ExpertMemory
from ep_rebalance.transport.host_copy import HostCopy
from ep_rebalance.transport.round_exchange import RoundExchange

logger = logging.getLogger(__name__)

Steps = Generator[None, None, None]

RESTORE_BYTES_PER_ROUND = 32 << 20


@dataclass(frozen=True, slots=True)
class StepTime:
    """One engine step of this rank: wall seconds, and whether it also moved experts."""

    seconds: float
    migrated: bool


class Rebalancer:
    """One rank's part in balancing one model.

    placement: what the engine loaded. memory: this rank's expert weights, or None in mode observe,
    which moves nothing. status: what rank 0 shows; other ranks fill theirs alike.
    """

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        placement: Placement,
        counts: DeviceCounts,
        memory: ExpertMemory | None,
        group: dist.ProcessGroup,
        topology: Topology,
        identity: ModelIdentity,
        status: Status,
    ) -> None:
        self.config = config
        self.served = Served.initial(placement)
        self.step_times: deque[StepTime] = deque(maxlen=65_536)
        self._rank = dist.get_rank(group)
        self._group = group
        self._topology = topology
        self._counts = counts
        self._memory = memory
        self._journal = Journal(status, contiguous=placement, rank=self._rank)
        self._window = LoadWindow(config.window.snapshots)
        self._snapshots = SnapshotExchange(group=group, counts=counts)
        staging_slots = _staging_slots(config, placement)
        self._exchange: RoundExchange | None = None
        if memory is not None:
            self._exchange = RoundExchange(
                group=group,
                memory=memory,
                max_bytes=config.migration.max_bytes_per_step,
                staging_slots=staging_slots,
            )
        self._background = Background(
            config=config,
            topology=topology,
            identity=identity,
            expert_bytes_L=memory.expert_bytes_L if memory else (),
            staging_slots=staging_slots,
        )
        self._plan_wire = torch.zeros(
            2, *placement.slots_LP.shape, dtype=torch.int64, device=counts.counts_LAE.device
        )
        self._flags = Flags()
        self._steps, self._busy_steps, self._busy_seconds = 0, 0, 0.0
        self._snapshots_since_plan = 0
        self._moved_in_step = False
        for layer in range(placement.num_layers):
            counts.set_dispatch(layer, placement, self.served.quotas_LP[layer], self._rank)
        self._loop = self._run()
        next(self._loop)

    @property
    def status(self) -> Status:
        return self._journal.status

    def step(self, started: float | None) -> None:
        """Advance by one engine step, between two forward passes.

        started: `time.perf_counter()` when the step's inputs were prepared; None for a step without
        tokens of this rank.
        """
        self._counts.end_step()
        self._steps += 1
        self.status.steps += 1
        self._moved_in_step = False
        self._advance()
        if started is not None:
            seconds = time.perf_counter() - started
            self._busy_steps += 1
            self._busy_seconds += seconds
            self.step_times.append(StepTime(seconds, self._moved_in_step))

    def _advance(self) -> None:
        try:
            next(self._loop)
        except Exception:
            # Ranks could no longer agree on their collectives: better an end with a cause than a hang.
            logger.exception("ep_rebalance: this rank cannot stay in step with the others")
            raise

    def restore(
        self, placement: Placement, quotas_LP: NDArray[np.float64], generation: int
    ) -> None:
        """Take up a saved placement before serving begins; blocks until all ranks have it.

        Raises RuntimeError if experts did not arrive whole.
        """
        assert self._memory is not None
        exchange = RoundExchange(
            group=self._group,
            memory=self._memory,
            max_bytes=RESTORE_BYTES_PER_ROUND,
            staging_slots=placement.slots_per_rank,
        )
        migration = schedule(
            self.served.placement,
            placement,
            quotas_LP,
            topology=self._topology,
            expert_bytes_L=self._memory.expert_bytes_L,
            max_bytes_per_round=RESTORE_BYTES_PER_ROUND,
            staging_slots=placement.slots_per_rank,
        )
        for batch in migration.batches:
            exchange.begin_batch()
            for round_ in batch.rounds:
                exchange.exchange(batch, round_)
            if faults := exchange.faults_of(exchange.vote(batch)):
                raise RuntimeError(f"the saved placement could not be taken up: {faults}")
            self._commit(batch, migration, exchange)
        self._commit_tables_alone(migration)
        self._number(generation)

    # The loop. Each method below is advanced by `step`; a bare `yield` is the end of an engine
    # step.

    def _run(self) -> Steps:
        while True:
            yield from self._until_plan_is_due()
            if (yield from self._plan()):
                migration = yield from self._schedule()
                if migration is not None:
                    yield from self._migrate(migration)

    def _until_plan_is_due(self) -> Steps:
        window, planner = self.config.window, self.config.planner
        plans = self.config.mode == "rebalance" and planner.policy != "none"
        while True:
            yield from self._snapshot()
            due = plans and self._snapshots_since_plan >= planner.interval_snapshots
            seen = len(self._window) >= window.min_snapshots
            if due and seen and self._window.tokens >= window.min_tokens:
                return

    def _snapshot(self) -> Generator[None, None, Snapshot]:
        """One snapshot: the steps that it counts, the all-reduce, and one step for the copy to the
        host.
        """
        for _ in range(self.config.window.snapshot_steps):
            yield
        copy = self._snapshots.begin(
            self._flags,
            steps=self._steps,
            busy_steps=self._busy_steps,
            busy_seconds=self._busy_seconds,
        )
        self._steps, self._busy_steps, self._busy_seconds = 0, 0, 0.0
        yield
        snapshot = self._snapshots.finish(copy)
        if snapshot.sample.counts_ALE.any():
            self._window.append(snapshot.sample)
            self._snapshots_since_plan += 1
        self._journal.snapshot(snapshot, self.served)
        return snapshot

    def _plan(self) -> Generator[None, None, bool]:
        """Rank 0 plans; True if all ranks have an accepted plan in `_plan_wire`."""
        self._snapshots_since_plan = 0
        self._flags = Flags()
        job: Future[Proposal] | None = None
        if self._rank == 0:
            window = self._window
            job = self._background.propose(window.samples_WLE(), self.served, window.step_seconds)
        deadline = time.monotonic() + self.config.planner.deadline_seconds
        while True:
            if job is not None and job.done():
                self._flags = Flags(planned=1, proposed=int(self._take_proposal(job)))
                job = None
            elif job is not None and time.monotonic() > deadline:
                self._journal.stuck("the planner takes longer than planner.deadline_seconds")
            snapshot = yield from self._snapshot()
            if snapshot.flags.planned:
                break
        self._flags = Flags()
        self._journal.unstuck()
        if snapshot.flags.proposed:
            source = dist.get_global_rank(self._group, 0)
            dist.broadcast(self._plan_wire, src=source, group=self._group)
        return bool(snapshot.flags.proposed)

    def _schedule(self) -> Generator[None, None, Migration | None]:
        """Every rank works out the same rounds; they begin when all are done."""
        wire = HostCopy(self._plan_wire)
        yield
        job = self._background.schedule(self.served, wire.result().numpy())
        migration: Migration | None = None
        ranks = self.served.placement.num_ranks
        while True:
            if job.done() and self._flags == Flags():
                migration = self._take_schedule(job)
                done = migration is not None
                self._flags = Flags(scheduled=int(done), failed=int(not done))
            snapshot = yield from self._snapshot()
            if snapshot.flags.scheduled + snapshot.flags.failed == ranks:
                break
        self._flags = Flags()
        if snapshot.flags.failed:
            reason = f"{snapshot.flags.failed} rank(s) could not work out the rounds"
            self._journal.outcome("failed", reason)
            return None
        assert migration is not None
        steps = migration.num_rounds + 2 * len(migration.batches)
        if steps > self.config.migration.deadline_steps:
            self._journal.outcome(
                "over_budget",
                f"moving {migration.num_moves} experts takes {steps} steps at "
                f"{self.config.migration.max_bytes_per_step} bytes per step, more than "
                f"migration.deadline_steps={self.config.migration.deadline_steps}",
            )
            return None
        return migration

    def _migrate(self, migration: Migration) -> Steps:
        assert self._exchange is not None
        began = time.perf_counter()
        self.status.migrating = 1
        fault = ""
        for batch in migration.batches:
            fault = yield from self._move(self._exchange, batch)
            if fault:
                break
            self._commit(batch, migration, self._exchange)
            self._moved_in_step = True
        if not fault:
            self._commit_tables_alone(migration)
        if self.served.placement != migration.source:
            self._number(self.served.generation + 1)
            if self._rank == 0:
                self._background.save(self.served, self._window.load_LE().astype(np.float64))
        self._journal.migration_ended(time.perf_counter() - began, fault)
        yield

    def _move(self, exchange: RoundExchange, batch: Batch) -> Generator[None, None, str]:
        """All rounds of a batch and the vote on them; the fault, or "" if the batch can be
        committed.
        """
        exchange.begin_batch()
        try:
            for round_ in batch.rounds:
                began = time.perf_counter()
                exchange.exchange(batch, round_)
                self._journal.round_stalled(time.perf_counter() - began)
                self._moved_in_step = True
                yield
            vote = exchange.vote(batch)
            yield
            return str(faults) if (faults := exchange.faults_of(vote)) else ""
        except RuntimeError as error:
            logger.exception("ep_rebalance: the migration cannot go on")
            return str(error)

    def _take_proposal(self, job: Future[Proposal]) -> bool:
        """True if the plan is to be carried out; then it is in `_plan_wire`."""
        try:
            proposal = job.result()
            wire = plan_to_wire(proposal.plan)
        except Exception as error:
            logger.exception("ep_rebalance: planning failed; serving goes on unchanged")
            self._journal.outcome("failed", f"the planner raised {type(error).__name__}: {error}")
            return False
        self._journal.proposal(proposal)
        self._plan_wire.copy_(torch.from_numpy(wire))
        return proposal.decision.accepted

    def _take_schedule(self, job: Future[Migration]) -> Migration | None:
        try:
            return job.result()
        except Exception:
            logger.exception("ep_rebalance: the rounds could not be worked out")
            return None

    def _commit(self, batch: Batch, migration: Migration, exchange: RoundExchange) -> None:
        assert self._memory is not None
        began = time.perf_counter()
        self.served = commit_batch(
            batch,
            migration,
            self.served,
            staging=exchange.staging,
            memory=self._memory,
            counts=self._counts,
            rank=self._rank,
        )
        self._journal.committed(batch, self._memory.expert_bytes_L, time.perf_counter() - began)

    def _commit_tables_alone(self, migration: Migration) -> None:
        """Layers that only change their quotas."""
        moved = {layer for batch in migration.batches for layer in batch.layers}
        rest = tuple(layer for layer in range(migration.target.num_layers) if layer not in moved)
        self.served = commit_tables(
            rest, migration.target, migration.quotas_LP, self.served, self._counts, self._rank
        )

    def _number(self, generation: int) -> None:
        self.served = replace(self.served, generation=generation)
        self._journal.generation(generation)


def _staging_slots(config: RebalanceConfig, placement: Placement) -> int:
    """Experts that staging holds: two layers' arrivals, or for a planner without a bound a whole
    rank's.
    """
    bounded = 2 * config.planner.max_arrivals_per_rank_and_layer
    return placement.slots_per_rank if config.planner.policy == "greedy" else bounded
