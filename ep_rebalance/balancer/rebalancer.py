"""The loop that ties the stages together: a generator that is advanced once per engine step on
every rank.

Every collective in it happens in the same step on every rank, because each branch is taken on
values that were summed or broadcast before. What takes long runs in `planner_thread.py`; ranks learn in
the next snapshot that it is done.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from subprocess import DEVNULL

import torch.distributed as dist

from ep_rebalance.balancer.control import Action, Control
from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.balancer.planner_thread import PlannerThread
from ep_rebalance.balancer.quota_refresh import QuotaRefresh
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.collectives.plan_broadcast import PlanBroadcast
from ep_rebalance.collectives.snapshot import Flags, Snapshot, SnapshotExchange
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.load.step_times import StepTimes
from ep_rebalance.load.window import LoadWindow
from ep_rebalance.migration import compile_schedule
from ep_rebalance.migration.commit import PreparedMigration, Served
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import compile_planner
from ep_rebalance.planning.problem import Planner
from ep_rebalance.planning.proposal import TimedProposal
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.journal import Journal
from ep_rebalance.telemetry.metrics import Status
from ep_rebalance.telemetry.overview_report import Overview
from ep_rebalance.topology import Topology

logger = logging.getLogger(__name__)

_COMPILES = (
    "from ep_rebalance.migration import compile_schedule\n"
    "from ep_rebalance.planning.policies import compile_planner\n"
    "compile_schedule()\n"
    "compile_planner()\n"
)

Steps = Generator[None, None, None]

WEIGHTS_REPLACED = "the engine's weights were replaced"


class Rebalancer:
    """One rank's part in balancing one model.

    placement: what the engine loaded. memory: this rank's expert weights, or None in mode observe,
    which moves nothing. status: what rank 0 shows; other ranks fill theirs alike. recorder: rank 0's,
    if a trace is configured.
    """

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        placement: Placement,
        counts: RoutingTables,
        memory: ExpertMemory | None,
        group: dist.ProcessGroup,
        planner: Planner,
        topology: Topology,
        identity: ModelIdentity,
        status: Status,
        recorder: Recorder | None = None,
    ) -> None:
        self.config = config
        self.step_times = StepTimes()
        self._rank = dist.get_rank(group)
        self._counts = counts
        self.journal = Journal(status, contiguous=placement, rank=self._rank)
        self.migrator = Migrator(
            config=config,
            placement=placement,
            counts=counts,
            memory=memory,
            group=group,
            topology=topology,
            journal=self.journal,
        )
        self._window = LoadWindow(config.window.snapshots)
        self._snapshots = SnapshotExchange(group=group, counts=counts)
        self._background = PlannerThread(
            config=config,
            planner=planner,
            topology=topology,
            identity=identity,
            expert_bytes_L=self.migrator.expert_bytes_L,
            staging_slots=self.migrator.staging_slots,
            rank=self._rank,
        )
        self._plans = PlanBroadcast(
            group=group, shape=placement.slots_LP.shape, device=counts.counts_LAE.device
        )
        self._quotas = QuotaRefresh(
            background=self._background,
            counts=counts,
            migrator=self.migrator,
            ranks=dist.get_world_size(group),
        )
        self._recorder = recorder
        self._control = Control(config)
        self._flags = Flags()
        self._replaced = False  # by the newest snapshot: any weights, since `served` was agreed on
        self._loop = self._run()
        next(self._loop)

    def warm_up(self) -> None:
        """Compile every kernel and connect to every rank, before serving; all ranks in the same order.

        What is served and what is counted stay as they are.
        """
        _compile()
        self._counts.warm_up()
        self._snapshots.warm_up()
        self._plans.warm_up()
        self.migrator.warm_up()

    @property
    def status(self) -> Status:
        return self.journal.status

    @property
    def served(self) -> Served:
        return self.migrator.served

    def status_now(self) -> Status:
        """The status with all that it shows brought up to now."""
        status = self.journal.report(self.served, self.config.metrics)
        status.paused = int(self._control.paused)
        status.lost_trace_records = self._recorder.lost if self._recorder is not None else 0
        return status

    def overview(self) -> Overview:
        """The status, and what recent snapshots say of ranks and of the hottest experts."""
        return self.journal.overview(self.status_now(), self.served)

    def ask(self, action: Action) -> str | None:
        """Take an operator's request; returns why it cannot be followed, or "". None on other ranks
        than rank 0, from which they learn of it.
        """
        return None if self._rank else self._control.ask(action, self.status)

    def weights_replaced(self, layers: tuple[int, ...]) -> None:
        """The engine wrote all slots of `layers` anew, in the order in which it loads them.

        Ranks may be told in different steps, but of the same layers in the same order. Each serves what
        was loaded at once; the loop goes on to take part in what all ranks do, until the snapshot says
        that all of them were told.
        """
        self.journal.weights_replaced()
        if self.config.mode != "observe":
            self.migrator.weights_replaced(layers)

    def step(self, started: float | None, continues: bool = False) -> None:
        """Advance by one engine step, between two forward passes.

        started: `time.perf_counter()` when the step's inputs were prepared; None for a step without
        tokens of this rank. continues: some request was scheduled in the step before as well, so that
        the engine had work all the time between the two.
        """
        self._counts.end_step()
        self.step_times.begin()
        self.status.steps += 1
        actions = self.migrator.actions
        self._advance()
        self.migrator.read_stalls()
        moved = self.migrator.actions > actions
        self.step_times.end(started, time.perf_counter(), continues=continues, migrated=moved)

    def _advance(self) -> None:
        try:
            next(self._loop)
        except Exception:
            # Ranks could no longer agree on their collectives: better an end with a cause than a hang.
            logger.exception("ep_rebalance: this rank cannot stay in step with the others")
            raise

    # The loop. Each method below is advanced by `step`; a bare `yield` is the end of an engine
    # step.

    def _run(self) -> Steps:
        while True:
            yield from self._until_plan_is_due()
            if (yield from self._plan()):
                prepared = yield from self._schedule()
                if prepared is not None:
                    yield from self._migrate(prepared)

    def _until_plan_is_due(self) -> Steps:
        window, planner = self.config.window, self.config.planner
        plans = self.config.mode == "rebalance" and planner.policy != "none"
        self.journal.activity("watching")
        while True:
            flags = (yield from self._snapshot()).flags
            due = self._window.plan_is_due(window, planner.interval_snapshots)
            asked = flags.plan_asked and len(self._window)
            if plans and not flags.paused and not self._replaced and (due or asked):
                return

    def _snapshot(self) -> Generator[None, None, Snapshot]:
        """One snapshot: the steps that it counts, the all-reduce, and one step for the copy to the
        host.
        """
        for _ in range(self.config.window.snapshot_steps):
            yield
        flags = replace(
            self._flags,
            fitted=int(self._quotas.fitted),
            paused=int(self._control.paused),
            plan_asked=int(self._control.plan_asked),
            reloads=self.migrator.reloads,
            reloads_squared=self.migrator.reloads**2,
        )
        self._snapshots.begin(flags, self.step_times.take_sum())
        yield
        snapshot = self._snapshots.finish(self.served.generation)
        self._window.append(snapshot.sample)
        if self._recorder is not None:
            self._recorder.snapshot(snapshot, self.served, self.status.steps)
        self.journal.snapshot(snapshot, self.served)
        fresh = self._window.samples() if snapshot.sample.routed else ()
        self._quotas.snapshot(snapshot.flags.fitted, fresh)
        ranks = self.served.placement.num_ranks
        self._replaced = snapshot.flags.reloads > ranks * self.migrator.agreed_reloads
        if self._replaced:
            self._serve_loaded(snapshot.flags)
        return snapshot

    def _serve_loaded(self, flags: Flags) -> None:
        """Serve what was loaded, as soon as the weights of all ranks were replaced equally often:
        R x sum of squares = square of the sum.
        """
        ranks = self.served.placement.num_ranks
        if ranks * flags.reloads_squared != flags.reloads**2:
            self.journal.stuck("the weights of some ranks were replaced, and of others not yet")
            return
        before = self.served
        self._quotas.forget()
        self._window.clear()
        self.migrator.serve_loaded(flags.reloads // ranks)
        self.journal.unstuck()
        if self.config.mode == "static":
            self._return_to(before)

    def _return_to(self, before: Served) -> None:
        """Serve the saved placement again; all ranks wait here until they do, or none does."""
        try:
            self.migrator.restore(before.placement, before.quotas_LP, self.served.generation)
        except RuntimeError as error:
            logger.exception("ep_rebalance: the experts stay where they were loaded")
            self.journal.outcome("abandoned", str(error))

    def _plan(self) -> Generator[None, None, bool]:
        """Rank 0 plans; True if its plan is to be carried out."""
        self.journal.activity("planning")
        self._control.plan_asked = False
        unseen = self._window.begin_plan()
        self._flags = Flags()
        job: Future[TimedProposal] | None = None
        if self._rank == 0:
            window = self._window
            job = self._background.propose(
                window.samples(), self.served, unseen, window.step_seconds
            )
        deadline = time.monotonic() + self.config.planner.deadline_seconds
        while True:
            if job is not None and job.done():
                self._flags = Flags(planned=1, proposed=int(self._take_proposal(job)))
                job = None
            elif job is not None and time.monotonic() > deadline:
                self.journal.stuck("the planner takes longer than planner.deadline_seconds")
            snapshot = yield from self._snapshot()
            if snapshot.flags.planned or self._replaced:
                break
        self._flags = Flags()
        if self._replaced:
            self.journal.outcome("abandoned", WEIGHTS_REPLACED)
            return False
        self.journal.unstuck()
        if snapshot.flags.proposed and snapshot.flags.paused:
            self.journal.outcome("abandoned", "an operator paused before it could begin")
            return False
        return bool(snapshot.flags.proposed)

    def _schedule(self) -> Generator[None, None, PreparedMigration | None]:
        """Every rank works out the same rounds; they begin when all are done."""
        self.journal.activity("scheduling")
        wire = self._plans.begin()
        yield
        job = self._background.schedule(self.served, wire.result().numpy(), self._counts)
        ranks = self.served.placement.num_ranks
        while True:
            if job.done() and self._flags == Flags():
                error = job.exception()
                if error is not None:
                    logger.error("ep_rebalance: the rounds were not worked out", exc_info=error)
                self._flags = Flags(scheduled=int(error is None), failed=int(error is not None))
            snapshot = yield from self._snapshot()
            if snapshot.flags.scheduled + snapshot.flags.failed == ranks or self._replaced:
                break
        self._flags = Flags()
        if self._replaced:
            self.journal.outcome("abandoned", WEIGHTS_REPLACED)
            return None
        if snapshot.flags.failed:
            reason = f"{snapshot.flags.failed} rank(s) could not work out the rounds"
            self.journal.outcome("failed", reason)
            return None
        prepared, limits = job.result(), self.config.migration
        migration = prepared.migration
        if migration.num_steps > limits.deadline_steps:
            self.journal.outcome(
                "over_budget",
                f"moving {migration.num_moves} experts takes {migration.num_steps} steps at "
                f"{limits.max_bytes_per_step} bytes per step, more than "
                f"migration.deadline_steps={limits.deadline_steps}",
            )
            return None
        return prepared

    def _migrate(self, prepared: PreparedMigration) -> Steps:
        self._quotas.forget()
        began, generation = time.perf_counter(), self.served.generation
        self.journal.migration_began(prepared.migration)
        fault = yield from self.migrator.migrate(prepared)
        if self._rank == 0 and self.served.generation != generation:
            self._background.save(self.served, self._window.samples())
        self.journal.migration_ended(time.perf_counter() - began, fault)
        yield

    def _take_proposal(self, job: Future[TimedProposal]) -> bool:
        """True if the plan is to be carried out; then it waits in `_plans`."""
        try:
            timed = job.result()
            if timed.proposal.decision.accepted:
                self._plans.put(timed.proposal.plan)
        except Exception as error:
            logger.exception("ep_rebalance: planning failed; serving goes on unchanged")
            self.journal.outcome("failed", f"the planner raised {type(error).__name__}: {error}")
            return False
        self.journal.proposal(timed)
        return timed.proposal.decision.accepted


def compile_in_background() -> None:
    """Begin with what takes longest of `warm_up`, while an engine loads its weights: half a minute of one
    core, where planner and scheduler were never compiled before.

    A process of its own does it and leaves the machine code on disk, where numba can write there: a thread
    would keep the interpreter lock from the loader.
    """
    threading.Thread(target=_compile_elsewhere, name="ep_rebalance-compile", daemon=True).start()


def _compile_elsewhere() -> None:
    program = [sys.executable, "-P", "-c", _COMPILES]
    with suppress(OSError):
        subprocess.run(program, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, check=False)


def _compile() -> None:
    """Every rank fits quotas, so that every rank needs the planner's code."""
    compile_schedule()
    compile_planner()
