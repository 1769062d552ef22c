"""The loop that ties the stages together: a generator that is advanced once per engine step on every rank.

Every collective in it happens in the same step on every rank, because each branch is taken on values that were summed
or broadcast before. Work that can take long (planning, working out rounds, writing the state file) runs in one
background thread; ranks learn in the next snapshot that it is done.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance import __version__
from ep_rebalance.commit import Served, commit_batch, commit_tables
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.counts import DeviceCounts
from ep_rebalance.load_window import PHASES, LoadWindow
from ep_rebalance.metrics import Status
from ep_rebalance.migration import Batch, Migration, schedule
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.decision import Decision, decide
from ep_rebalance.planning.plan import Budget, Plan
from ep_rebalance.planning.policies import make_plan
from ep_rebalance.snapshot import Flags, Snapshot, SnapshotExchange
from ep_rebalance.state import FORMAT, FORMAT_VERSION, Header, ModelIdentity, SavedState, save_state
from ep_rebalance.topology import LINKS, Topology
from ep_rebalance.transport.expert_memory import ExpertMemory
from ep_rebalance.transport.host_copy import HostCopy
from ep_rebalance.transport.round_exchange import RoundExchange

logger = logging.getLogger(__name__)

Steps = Generator[None, None, None]

QUOTA_UNIT = 1 << 30
START_ROUND_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class StepTime:
    """One engine step of this rank: wall seconds, and bytes of experts that it also moved (0: none)."""

    seconds: float
    migrated: bool


class Rebalancer:
    """One rank's part in balancing one model.

    memory: this rank's expert weights, or None in mode observe, which moves nothing.
    status: what rank 0 shows; on other ranks it is filled alike and not read.
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
        self.status = status
        self.served = Served.initial(placement)
        self.step_times: deque[StepTime] = deque(maxlen=65_536)
        self._contiguous = placement
        self._rank = dist.get_rank(group)
        self._group = group
        self._counts = counts
        self._memory = memory
        self._topology = topology
        self._identity = identity
        self._window = LoadWindow(config.window.snapshots)
        self._snapshots = SnapshotExchange(group=group, counts=counts)
        self._staging_slots = 2 * config.planner.max_arrivals_per_rank_and_layer
        if config.planner.policy == "greedy":
            self._staging_slots = max(self._staging_slots, placement.slots_per_rank)
        self._exchange: RoundExchange | None = None
        if memory is not None:
            self._exchange = RoundExchange(
                group=group,
                memory=memory,
                max_bytes=config.migration.max_bytes_per_step,
                staging_slots=self._staging_slots,
            )
        self._plan_wire = torch.zeros(
            2, *placement.slots_LP.shape, dtype=torch.int64, device=counts.counts_LAE.device
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ep_rebalance")
        self._flags = Flags()
        self._pending_steps = 0
        self._pending_seconds = 0.0
        self._snapshots_since_plan = 0
        self._moved_this_step = False
        for layer in range(placement.num_layers):
            counts.set_dispatch(layer, placement, self.served.quotas_LP[layer], self._rank)
        self._loop = self._run()
        next(self._loop)

    # -- the engine's side ---------------------------------------------------------------------------------------

    def step(self, started: float | None) -> None:
        """Advance by one engine step, between two forward passes.

        started: `time.perf_counter()` when the step's inputs were prepared; None for a step without tokens of
        this rank.
        """
        self._counts.end_step()
        self._pending_steps += 1
        self.status.steps += 1
        self._moved_this_step = False
        next(self._loop)
        if started is not None:
            seconds = time.perf_counter() - started
            self._pending_seconds += seconds
            self.step_times.append(StepTime(seconds, self._moved_this_step))

    def restore(self, placement: Placement, quotas_LP: NDArray[np.float64], generation: int) -> None:
        """Take up a saved placement before serving begins; blocks until all ranks have it.

        Raises RuntimeError if experts did not arrive whole; then the loaded placement is served unchanged.
        """
        assert self._memory is not None
        slots = placement.slots_per_rank
        exchange = RoundExchange(
            group=self._group,
            memory=self._memory,
            max_bytes=START_ROUND_BYTES,
            staging_slots=slots,
        )
        migration = schedule(
            self.served.placement,
            placement,
            quotas_LP,
            topology=self._topology,
            expert_bytes_L=self._memory.expert_bytes_L,
            max_bytes_per_round=START_ROUND_BYTES,
            staging_slots=slots,
        )
        for batch in migration.batches:
            exchange.begin_batch()
            for round_ in batch.rounds:
                exchange.exchange(batch, round_)
            if faults := exchange.faults_of(exchange.vote(batch)):
                raise RuntimeError(f"the saved placement was not taken up: {faults}")
            self._commit(batch, migration, exchange)
        self._commit_remaining_tables(migration)
        self._set_generation(generation)

    def close(self) -> None:
        """Let the background thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _run(self) -> Steps:
        while True:
            yield from self._until_plan_is_due()
            target = yield from self._plan()
            if target is not None:
                migration = yield from self._schedule(*target)
                if migration is not None:
                    yield from self._migrate(migration)

    def _until_plan_is_due(self) -> Steps:
        window, planner = self.config.window, self.config.planner
        while True:
            yield from self._snapshot()
            due = self._snapshots_since_plan >= planner.interval_snapshots
            seen = len(self._window) >= window.min_snapshots
            if due and seen and self._window.tokens >= window.min_tokens and self._plans:
                return

    @property
    def _plans(self) -> bool:
        return self.config.mode == "rebalance" and self.config.planner.policy != "none"

    def _snapshot(self) -> Generator[None, None, Snapshot]:
        """One snapshot: the steps that it counts, the all-reduce, and one step for the copy to the host."""
        for _ in range(self.config.window.snapshot_steps):
            yield
        steps, seconds = self._pending_steps, self._pending_seconds
        self._pending_steps, self._pending_seconds = 0, 0.0
        copy = self._snapshots.begin(self._flags, steps=steps, step_seconds=seconds / max(steps, 1))
        yield
        snapshot = self._snapshots.finish(copy)
        if snapshot.sample.counts_ALE.any():
            self._window.append(snapshot.sample)
            self._snapshots_since_plan += 1
        self._observe(snapshot)
        return snapshot

    def _plan(
        self,
    ) -> Generator[None, None, tuple[Placement, NDArray[np.float64]] | None]:
        """Rank 0 plans; returns the target that all ranks received, or None if there is nothing to do."""
        self._snapshots_since_plan = 0
        job = self._thread.submit(self._propose) if self._rank == 0 else None
        plan: Plan | None = None
        self._flags = Flags()
        while True:
            if job is not None and job.done():
                plan = self._take_proposal(job)
                self._flags = Flags(planned=1, proposed=int(plan is not None))
                job = None
            snapshot = yield from self._snapshot()
            if snapshot.flags.planned:
                break
        self._flags = Flags()
        if not snapshot.flags.proposed:
            return None
        return (yield from self._broadcast(plan))

    def _broadcast(
        self, plan: Plan | None
    ) -> Generator[None, None, tuple[Placement, NDArray[np.float64]]]:
        if plan is not None:
            self._plan_wire[0].copy_(torch.from_numpy(plan.placement.slots_LP.astype(np.int64)))
            quota_units = np.rint(plan.quotas_LP * QUOTA_UNIT).astype(np.int64)
            self._plan_wire[1].copy_(torch.from_numpy(quota_units))
        source = dist.get_global_rank(self._group, 0)
        dist.broadcast(self._plan_wire, src=source, group=self._group)
        copy = HostCopy(self._plan_wire)
        yield
        slots_LP, quota_units = copy.result().numpy()
        placement = self.served.placement
        target = Placement(slots_LP.astype(np.int32), placement.num_experts, placement.num_ranks)
        return target, quota_units / QUOTA_UNIT

    def _schedule(
        self, target: Placement, quotas_LP: NDArray[np.float64]
    ) -> Generator[None, None, Migration | None]:
        """Every rank works out the same rounds; they begin when all are done."""
        job = self._thread.submit(self._schedule_moves, target, quotas_LP)
        migration: Migration | None = None
        while True:
            if job.done() and self._flags == Flags():
                migration = self._take_schedule(job)
                self._flags = Flags(scheduled=int(migration is not None), failed=int(migration is None))
            snapshot = yield from self._snapshot()
            if snapshot.flags.scheduled + snapshot.flags.failed == self.served.placement.num_ranks:
                break
        self._flags = Flags()
        if snapshot.flags.failed:
            self._count_plan("failed", f"{snapshot.flags.failed} rank(s) could not work out the rounds")
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
            stalled = time.perf_counter()
            self._commit(batch, migration, self._exchange)
            self.status.commit_stall_seconds.add(time.perf_counter() - stalled)
            self._moved_this_step = True
        else:
            self._commit_remaining_tables(migration)
        self.status.migrating = 0
        self.status.migration_seconds.add(time.perf_counter() - began)
        self._conclude(migration, fault)
        yield

    def _move(self, exchange: RoundExchange, batch: Batch) -> Generator[None, None, str]:
        """All rounds of a batch and the vote on them; returns the fault, or "" if the batch can be committed."""
        exchange.begin_batch()
        try:
            for round_ in batch.rounds:
                stalled = time.perf_counter()
                exchange.exchange(batch, round_)
                self.status.round_stall_seconds.add(time.perf_counter() - stalled)
                self._moved_this_step = True
                yield
            vote = exchange.vote(batch)
            yield
            return str(faults) if (faults := exchange.faults_of(vote)) else ""
        except RuntimeError as error:
            logger.exception("ep_rebalance: the migration cannot go on")
            return str(error)

    # -- off the step path ---------------------------------------------------------------------------------------

    def _propose(self) -> tuple[Plan, Decision, float]:
        began = time.perf_counter()
        planner, served = self.config.planner, self.served
        slots = served.placement.slots_LP.size
        budget = Budget(
            max_moved_slots=max(2, int(slots * planner.max_moved_fraction)),
            max_arrivals=planner.max_arrivals_per_rank_and_layer,
        )
        plan = make_plan(
            planner.policy, self._window.samples_WLE(), served.placement, self._topology, budget, planner.seed
        )
        assert self._memory is not None
        decision = decide(
            plan,
            step_seconds=self._window.step_seconds,
            expert_bytes_L=self._memory.expert_bytes_L,
            current=served.placement,
            topology=self._topology,
            config=self.config.decision,
        )
        return plan, decision, time.perf_counter() - began

    def _take_proposal(self, job: Future[tuple[Plan, Decision, float]]) -> Plan | None:
        try:
            plan, decision, seconds = job.result()
        except Exception as error:
            logger.exception("ep_rebalance: planning failed; serving goes on unchanged")
            self._count_plan("failed", f"the planner raised {type(error).__name__}: {error}")
            return None
        self.status.plan_seconds.add(seconds)
        self.status.last_decision = decision.reason
        if decision.outcome != "accepted":
            self._count_plan(decision.outcome, decision.reason)
            return None
        self.status.predicted_imbalance = plan.imbalance_after_L.tolist()
        return plan

    def _schedule_moves(self, target: Placement, quotas_LP: NDArray[np.float64]) -> Migration:
        assert self._memory is not None
        return schedule(
            self.served.placement,
            target,
            quotas_LP,
            topology=self._topology,
            expert_bytes_L=self._memory.expert_bytes_L,
            max_bytes_per_round=self.config.migration.max_bytes_per_step,
            staging_slots=self._staging_slots,
        )

    def _take_schedule(self, job: Future[Migration]) -> Migration | None:
        try:
            return job.result()
        except Exception:
            logger.exception("ep_rebalance: the rounds could not be worked out")
            return None

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _commit(self, batch: Batch, migration: Migration, exchange: RoundExchange) -> None:
        assert self._memory is not None
        self.served = commit_batch(
            batch,
            migration,
            self.served,
            staging=exchange.staging,
            memory=self._memory,
            counts=self._counts,
            rank=self._rank,
        )
        for move in batch.moves:
            self.status.migrated_experts[move.link] += 1
            self.status.migrated_bytes[move.link] += self._memory.expert_bytes_L[move.layer]

    def _commit_remaining_tables(self, migration: Migration) -> None:
        """Layers that only change their quotas."""
        moved = {layer for batch in migration.batches for layer in batch.layers}
        rest = tuple(layer for layer in range(migration.target.num_layers) if layer not in moved)
        self.served = commit_tables(
            rest, migration.target, migration.quotas_LP, self.served, self._counts, self._rank
        )

    def _conclude(self, migration: Migration, fault: str) -> None:
        if self.served.placement != migration.source:
            self._set_generation(self.served.generation + 1)
            self.status.last_commit_timestamp = time.time()
            if self._rank == 0 and self.config.state.path:
                self._thread.submit(self._save, self.served, self._window.load_LE())
        if fault:
            self._count_plan("abandoned", fault)
            return
        self._count_plan("committed", self.status.last_decision)

    def _set_generation(self, generation: int) -> None:
        self.served = Served(
            placement=self.served.placement, quotas_LP=self.served.quotas_LP, generation=generation
        )
        self.status.generation = generation

    def _count_plan(self, outcome: str, reason: str) -> None:
        self.status.plans[outcome] += 1
        self.status.message = reason
        if self._rank == 0:
            log = logger.warning if outcome in ("abandoned", "failed") else logger.info
            log(
                "ep_rebalance: plan %s, generation %d: %s", outcome, self.served.generation, reason
            )

    def _observe(self, snapshot: Snapshot) -> None:
        sample, status = snapshot.sample, self.status
        status.snapshots += 1
        load_LE = sample.counts_ALE.sum(0)
        if not load_LE.any():
            return
        rank_load_LR = self.served.placement.rank_load_LR(load_LE, self.served.quotas_LP)
        status.imbalance = imbalance_L(rank_load_LR).tolist()
        status.contiguous_imbalance = imbalance_L(self._contiguous.rank_load_LR(load_LE)).tolist()
        status.step_seconds = sample.step_seconds
        for rank, tokens in enumerate(rank_load_LR.sum(0)):
            status.rank_tokens[rank] += round(tokens)
        top_k_layers = int(status.info["top_k"]) * status.layers
        for phase, counts_LE in zip(PHASES, sample.counts_ALE, strict=True):
            status.phase_tokens[phase] += int(counts_LE.sum()) // top_k_layers

    def _save(self, served: Served, load_LE: NDArray[np.float64]) -> None:
        header = Header(
            format=FORMAT,
            version=FORMAT_VERSION,
            identity=self._identity,
            generation=served.generation,
            saved_at=time.time(),
            plugin_version=__version__,
        )
        state = SavedState(
            header=header, placement=served.placement, quotas_LP=served.quotas_LP, load_LE=load_LE
        )
        try:
            save_state(Path(str(self.config.state.path)), state)
        except OSError as error:
            logger.warning("ep_rebalance: the state was not saved: %s", error)
            self.status.message = f"the state was not saved: {error}"


def initial_status(
    *,
    config: RebalanceConfig,
    model: str,
    placement: Placement,
    top_k: int,
) -> Status:
    """A status in which every label that will be counted exists already, at zero."""
    return Status(
        info={
            "version": __version__,
            "mode": config.mode,
            "policy": config.planner.policy,
            "ep_size": str(placement.num_ranks),
            "slots": str(placement.num_slots),
            "top_k": str(top_k),
        },
        model=model,
        layers=placement.num_layers,
        experts=placement.num_experts,
        ep_size=placement.num_ranks,
        slots=placement.num_slots,
        config=config.as_dict(),
        rank_tokens=[0] * placement.num_ranks,
        phase_tokens=dict.fromkeys(PHASES, 0),
        plans=dict.fromkeys(("committed", "no_gain", "over_budget", "abandoned", "failed"), 0),
        migrated_experts=dict.fromkeys(LINKS, 0),
        migrated_bytes=dict.fromkeys(LINKS, 0),
    )
