"""Drives the loop on one rank: answers what it asks for with collectives, jobs and engine steps.

The driver is a generator that is advanced once per engine step on every rank. Each of its collectives
happens in the same step on every rank, because the loop branches only on what ranks have agreed on. What
takes long runs in `planner_thread.py`, and ranks learn in a snapshot that it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ep_rebalance.balancer.ahead_of_time import compile_all
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
from ep_rebalance.balancer.auditor import Auditor
from ep_rebalance.balancer.control import Action, Control
from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.jobs import RankJobs
from ep_rebalance.balancer.loop import BalancingLoop
from ep_rebalance.balancer.migrator import Migrator, NotTakenUp
from ep_rebalance.balancer.planner_thread import PlannerThread
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.balancer.state_saver import StateSaver
from ep_rebalance.collectives.plan_broadcast import PlanBroadcast
from ep_rebalance.collectives.snapshot import Flags, SnapshotExchange
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.snapshot import Agreed, Snapshot
from ep_rebalance.load.step_times import StepTimes
from ep_rebalance.load.trace import MigrationEnd
from ep_rebalance.migration.commit import PreparedMigration
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.served import Served, ServedTokens
from ep_rebalance.planning.problem import Planner
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.events import (
    ErrorCaught,
    MigrationBegan,
    MigrationEnded,
    PlanEnded,
    SnapshotTaken,
    WeightsReplaced,
)
from ep_rebalance.telemetry.file_health import FileHealth
from ep_rebalance.telemetry.journal import Journal, initial_status
from ep_rebalance.telemetry.metrics import Status
from ep_rebalance.telemetry.overview_report import Overview

logger = logging.getLogger(__name__)

Steps = Generator[None, None, None]


class Rebalancer:
    """One rank's part in balancing one model.

    counts: this rank's counters and dispatch tables.
    memory: this rank's expert weights; None in mode observe, which moves nothing.
    recorder: rank 0's, if a trace is configured.
    """

    def __init__(
        self,
        config: RebalanceConfig,
        model: EngineModel,
        *,
        counts: RoutingTables,
        memory: ExpertMemory | None,
        planner: Planner,
        recorder: Recorder | None = None,
    ) -> None:
        self.config = config
        self.step_times = StepTimes()
        self._steps = 0
        self._rank, self._ranks = dist.get_rank(model.group), model.placement.num_ranks
        self._counts = counts
        self.journal = _journal(config, model, self._rank)
        self._tell = self.journal.apply
        self.migrator = Migrator(
            config=config,
            placement=model.placement,
            counts=counts,
            memory=memory,
            group=model.group,
            topology=model.topology,
            tell=self._tell,
        )
        self._snapshots = SnapshotExchange(group=model.group, counts=counts)
        self._plans = PlanBroadcast(
            group=model.group, shape=model.placement.slots_LP.shape, device=model.device
        )
        self._jobs = RankJobs(
            PlannerThread(
                config=config,
                planner=planner,
                topology=model.topology,
                expert_bytes_L=self.migrator.expert_bytes_L,
                rank=self._rank,
            ),
            counts=counts,
            rank=self._rank,
            deadline_seconds=config.planner.deadline_seconds,
            tell=self._tell,
        )
        self._auditor = Auditor(self.migrator, rank=self._rank, ranks=self._ranks, tell=self._tell)
        self._recorder = recorder
        self._saver = _saver(config, model, self._rank)
        self._control = Control(config)
        self._loop = BalancingLoop(config, replicated=model.placement.num_redundant > 0)
        self._prepared: PreparedMigration | None = None
        self._saved: Served | None = None  # what mode static serves, once weights were replaced
        self._reloads = 0  # how many all ranks have been told of
        self._ended: MigrationEnd | None = None  # for the next snapshot's record
        self._window_began = self._earlier_steps = 0
        self._driver = drive(self._loop.run(), self._answer)
        next(self._driver)  # up to the first `yield`, where it waits for a step to end

    def warm_up(self) -> None:
        """Compile every kernel and connect to every rank, before serving. Collective.

        What is served and what is counted stay as they are.
        """
        # Most of these make collectives, so their order must be the same on all ranks.
        compile_all()
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
        """The status, brought up to date."""
        return self.journal.report(
            self.served,
            self.config.metrics,
            steps=self._steps,
            paused=self._control.paused,
            files=self._files(),
            lost_slots=0 if self.migrator.audit is None else len(self.migrator.audit.lost),
        )

    def _files(self) -> FileHealth:
        recorder, saver, faults = self._recorder, self._saver, {}
        if recorder is not None:
            faults["trace"] = recorder.fault
        if saver is not None:
            faults["state"] = saver.fault
        return FileHealth(
            faults=faults,
            lost_trace_records=0 if recorder is None else recorder.lost,
            state_saved=0.0 if saver is None else saver.saved,
        )

    def overview(self) -> Overview:
        """The status, with the recent load of ranks and of the hottest experts."""
        return self.journal.overview(self.status_now(), self.served)

    def ask(self, action: Action) -> str | None:
        """Take an operator's request.

        Returns "" or why it cannot be followed. Every rank but 0 returns None, and learns of the request
        from the next snapshot.
        """
        if self._rank:
            return None
        return self._control.ask(action, busy=self._loop.activity != "watching")

    def weights_replaced(self, layers: tuple[int, ...]) -> None:
        """The engine wrote all slots of `layers` anew, in the order in which it loads them.

        Ranks may be told in different steps, but of the same layers in the same order. Each serves what
        was loaded immediately. The loop keeps taking part in the ranks' collectives, until a snapshot
        says that all of them were told.
        """
        self._tell(WeightsReplaced())
        if layers and self.config.mode != "observe":
            self.migrator.weights_replaced(layers)

    def step(self, started: float | None, continues: bool = False) -> None:
        """Advance by one engine step, between two forward passes.

        started: seconds. `time.perf_counter()` when the step's inputs were prepared; None for a step
            without tokens of this rank.
        continues: whether some request was scheduled in the step before as well, so that the engine had
            work all the time in between.
        """
        self._counts.end_step()
        self.step_times.begin()
        self._steps += 1
        self._advance()
        self._auditor.step()
        self.migrator.read_stalls()
        migrated = self.migrator.take_actions() > 0
        self.step_times.end(started, time.perf_counter(), continues=continues, migrated=migrated)

    def _advance(self) -> None:
        try:
            next(self._driver)
        except Exception:
            # Ranks could no longer agree on their collectives: better an end with a cause than a hang.
            logger.exception("ep_rebalance: this rank cannot stay in step with the others")
            raise

    # What follows is advanced by `step`; a bare `yield` is the end of an engine step.

    def _answer(self, asked: Ask[Any]) -> Generator[None, None, Any]:
        match asked:
            case NextSnapshot():
                return (yield from self._snapshot())
            case FitQuotas():
                self._jobs.fit_quotas(asked, self.served)
            case TakeUpQuotas():
                self.migrator.serve_split(self._jobs.take_quotas())
            case ServeLoaded():
                self._serve_loaded()
            case Propose():
                self._control.plan_asked = False
                self._jobs.propose(asked, self.served)
            case WorkOutRounds():
                yield from self._work_out_rounds()
            case TakeRounds():
                self._prepared = self._jobs.take_rounds()
                return self._prepared.migration
            case Migrate():
                yield from self._migrate()
            case Tell(event):
                self._tell(event)
        return None

    def _snapshot(self) -> Generator[None, None, Snapshot]:
        """Takes `snapshot_steps` steps to count, and one more for the all-reduce and the copy to the host."""
        for _ in range(self.config.window.snapshot_steps):
            yield
        steps = self.step_times.take_sum()
        if steps.untimed:
            self._tell(
                ErrorCaught("step_times", f"{steps.untimed} steps took a time that cannot be")
            )
        before, earlier = self.migrator.take_before(), None
        self._window_began = self._steps
        self._snapshots.begin(self._flags(), steps, earlier=before is not None)
        yield  # the copy runs beside the next step, so that `finish` need not wait for it
        served = self.served
        sums = self._snapshots.finish(served.generation, served.placement, served.quotas_LP)
        if sums.refused:
            self._tell(ErrorCaught("snapshot", sums.refused))
        self.migrator.fill_copies()
        snapshot = Snapshot(sample=sums.sample, agreed=self._agreed(sums.flags))
        if before is not None and sums.earlier_ALE is not None:
            earlier = ServedTokens(counts_ALE=sums.earlier_ALE, served=before)
        if self._recorder is not None:
            self._recorder.snapshot_in_parts(
                snapshot,
                served,
                self._steps,
                self._ended,
                earlier=earlier,
                earlier_steps=self._earlier_steps,
            )
        self._ended = None
        self._tell(SnapshotTaken(snapshot.sample, served, earlier))
        self._jobs.forget_what_ended(snapshot.agreed)
        yield from self._auditor.follow(sums.flags, replaced=snapshot.agreed.replaced)
        return snapshot

    def _flags(self) -> Flags:
        """What this rank announces."""
        reloads = self.migrator.reloads
        audit_asked, self._control.audit_asked = self._control.audit_asked, False
        flags = replace(
            self._jobs.announced(),
            paused=int(self._control.paused),
            plan_asked=int(self._control.plan_asked),
            reloads=reloads,
            reloads_squared=reloads**2,
            audit_asked=int(audit_asked),
        )
        return self._auditor.announced(flags)

    def _agreed(self, flags: Flags) -> Agreed:
        """What follows from the sum of all ranks' flags."""
        ranks, known = self._ranks, self.migrator.agreed_reloads
        all_tried = flags.scheduled + flags.failed == ranks
        replaced = flags.reloads > ranks * known
        reloaded: tuple[int, ...] = ()
        # R sum(x**2) == sum(x)**2 exactly if all ranks have the same number x of reloads.
        if replaced and ranks * flags.reloads_squared == flags.reloads**2:
            self._reloads = flags.reloads // ranks
            reloaded = self.migrator.layers_reloaded(self._reloads)
        return Agreed(
            planned=flags.planned > 0,
            proposed=flags.proposed > 0,
            scheduled=flags.scheduled == ranks,
            unscheduled_ranks=flags.failed if all_tried else 0,
            fitted=flags.fitted == ranks,
            paused=flags.paused > 0,
            plan_asked=flags.plan_asked > 0,
            replaced=replaced or self.migrator.awaits_copies,
            reloaded=reloaded,
        )

    def _serve_loaded(self) -> None:
        # Nothing but a reload changes it in mode static. One that ended without it must not be the last word.
        self._saved = self._saved or self.served
        self._jobs.forget_quotas()
        self.migrator.serve_loaded(self._reloads)
        if self.config.mode == "static":
            self._return_to(self._saved)

    def _return_to(self, saved: Served) -> None:
        """Serve the saved placement again. All ranks wait here, until all of them do or none does."""
        try:
            self.migrator.restore(saved.placement, saved.quotas_LP, self.served.generation)
        except NotTakenUp as error:
            logger.exception("ep_rebalance: not all experts are where the state file has them")
            self._tell(PlanEnded("abandoned", str(error)))

    def _work_out_rounds(self) -> Steps:
        """All ranks work out the same rounds from one broadcast."""
        proposal = self._jobs.proposal  # None on all ranks but 0, which take part all the same
        if proposal is None:
            wire = self._plans.begin(None)
        else:
            wire = self._plans.begin(proposal.plan, proposal.decision.pace)
        yield
        self._jobs.work_out_rounds(wire.result().numpy(), self.served)

    def _migrate(self) -> Steps:
        prepared, self._prepared = self._prepared, None
        assert prepared is not None, "the rounds were taken"
        self._jobs.forget_quotas()
        began, generation = time.perf_counter(), self.served.generation
        self._tell(MigrationBegan(prepared.migration))
        outcome = yield from self.migrator.migrate(prepared)
        self._earlier_steps = self._steps - self._window_began
        if self._saver is not None and self.served.generation != generation:
            self._saver.save(self.served, self._loop.window.samples())
        self._ended = MigrationEnd(batches=outcome.batches, abandoned=bool(outcome.fault))
        seconds = time.perf_counter() - began
        self._tell(MigrationEnded(seconds, outcome.fault, self._jobs.proposal))
        yield  # ends the step of the last commit


def _saver(config: RebalanceConfig, model: EngineModel, rank: int) -> StateSaver | None:
    """Rank 0's, if there is a file for the state. What is served statically was saved before."""
    if rank or config.mode != "rebalance" or not config.state.path:
        return None
    return StateSaver(Path(config.state.path), model.identity)


def _journal(config: RebalanceConfig, model: EngineModel, rank: int) -> Journal:
    name, placement, top_k = model.identity.model, model.placement, model.top_k
    status = initial_status(
        config=config,
        model=name,
        placement=placement,
        top_k=top_k,
        self_test=model.self_test,
        topology=None if config.mode == "observe" else model.topology,
        moe_layers=model.moe_layers,
        pipeline_stage=model.pipeline_stage,
    )
    return Journal(
        status,
        contiguous=placement,
        top_k=top_k,
        rank=rank,
        by_own_counts=config.dispatch.by_own_counts,
        spoken=model.pipeline_stage.spoken,
    )
