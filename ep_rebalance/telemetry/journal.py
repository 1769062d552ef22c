"""Journal: turns events into the `Status` and the log. Nothing else writes to the status."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ep_rebalance.config import MetricsConfig, RebalanceConfig
from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.migration import Batch, Migration
from ep_rebalance.migration.served import Served, ServedTokens
from ep_rebalance.pipeline import ONLY_STAGE, PipelineStage
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.measured_gain import MeasuredGain
from ep_rebalance.planning.proposal import Proposal, TimedProposal
from ep_rebalance.telemetry.events import (
    ActivityBegan,
    BatchCommitted,
    CommitStalled,
    ErrorCaught,
    Event,
    GenerationServed,
    GotStuck,
    GotUnstuck,
    MigrationBegan,
    MigrationEnded,
    PlanEnded,
    PlanProposed,
    QuotasChanged,
    RoundStalled,
    SlotCorrupted,
    SlotsAudited,
    SnapshotTaken,
    WeightsReplaced,
)
from ep_rebalance.telemetry.file_health import FileHealth
from ep_rebalance.telemetry.imbalance import BalanceThread, RankBalance
from ep_rebalance.telemetry.load_report import ExpertLoad, expert_load
from ep_rebalance.telemetry.metrics import (
    COMMITS_KEPT,
    CORRUPTIONS_KEPT,
    OUTCOMES,
    STAGES,
    Commit,
    Corruption,
    PlanOutcome,
    Stage,
    Status,
)
from ep_rebalance.telemetry.overview_report import Overview, overview
from ep_rebalance.telemetry.self_test import NOT_TRIED, SelfTest
from ep_rebalance.topology import LINKS, Topology
from ep_rebalance.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """The state when a migration began.

    bytes: all bytes that had been moved until then.
    """

    generation: int = 0
    bytes: int = 0


class Journal:
    """Every rank keeps one; only rank 0's is shown and logged.

    contiguous: what the engine loaded.
    top_k: experts per token.
    by_own_counts: see `RankBalance`.
    spoken: what a log line begins with.
    """

    def __init__(
        self,
        status: Status,
        *,
        contiguous: Placement,
        top_k: int,
        rank: int,
        by_own_counts: bool = False,
        spoken: str = "",
    ) -> None:
        self.status = status
        self._spoken = spoken
        self._balance = BalanceThread(RankBalance(contiguous, by_own_counts=by_own_counts))
        self._rank = rank
        self._pairs_per_token = top_k * contiguous.num_layers
        self._before = Before()
        self._errors: dict[str, int] = dict.fromkeys(STAGES, 0)

    def report(
        self,
        served: Served,
        metrics: MetricsConfig,
        *,
        steps: int,
        paused: bool,
        files: FileHealth,
        lost_slots: int = 0,
    ) -> Status:
        """The status, brought up to date.

        metrics: which optional metrics are on; what only they show is left empty otherwise.
        steps: of the engine. They are told here and not as events: there are too many.
        """
        status, balance = self.status, self._balance.caught_up()
        status.steps = steps
        status.lost_slots = lost_slots
        in_metrics = self._errors["metrics"] + self._balance.failed
        status.internal_errors = {**self._errors, "metrics": in_metrics}
        status.reported_timestamp = time.time()
        status.paused = int(paused)
        status.lost_trace_records = files.lost_trace_records
        status.file_faults = dict(files.faults)
        status.file_failing = {name: int(bool(fault)) for name, fault in files.faults.items()}
        status.state_saved_timestamp = files.state_saved
        status.imbalance = list(balance.served.of_layers())
        status.contiguous_imbalance = list(balance.contiguous.of_layers())
        # Merged, so that `predicted` stays as the last migration set it.
        status.overall_imbalance |= _known(
            {"served": balance.served.overall(), "contiguous": balance.contiguous.overall()}
        )
        status.phase_imbalance = _known(
            {phase: seen.overall() for phase, seen in balance.phases.items()}
        )
        status.rank_tokens = balance.rank_tokens_LR.sum(axis=0).tolist()
        status.busiest_rank_tokens = dict(balance.busiest_tokens)
        # A token is counted K times in each of L layers: pairs = tokens * K * L.
        pairs_A = balance.tokens_ALE.sum(axis=(1, 2)).tolist()
        status.phase_tokens = {
            phase: pairs // self._pairs_per_token
            for phase, pairs in zip(PHASES, pairs_A, strict=True)
        }
        if metrics.replicas:
            status.replicas = (served.placement.replica_counts_LE() - 1).sum(axis=1).tolist()
        if metrics.layer_rank_tokens:
            status.layer_rank_tokens = balance.rank_tokens_LR.tolist()
        if metrics.expert_tokens:
            status.expert_tokens = balance.tokens_ALE.sum(axis=0).tolist()
        return status

    def load(self, served: Served) -> ExpertLoad:
        """The load of every expert since the start, and where it is served now."""
        return expert_load(self.status, self._balance.caught_up().tokens_ALE, served)

    def overview(self, status: Status, served: Served) -> Overview:
        """`status`, with the recent load of ranks and of the hottest experts."""
        balance = self._balance.caught_up()
        return overview(status, balance.recent_LR, balance.recent_LE, served.placement)

    def apply(self, event: Event) -> None:
        """Write what happened into the status, and into the log where it matters. Never raises: what cannot
        be written must not end a rank.
        """
        try:
            self._write(event)
        except Exception:
            self._errors["metrics"] += 1
            name = type(event).__name__
            logger.exception("ep_rebalance: %s%s is missing in the status", self._spoken, name)

    def _write(self, event: Event) -> None:
        status = self.status
        match event:
            case ActivityBegan(activity):
                status.activity = activity
            case SnapshotTaken(sample, served, earlier):
                self._add_snapshot(sample, served, earlier)
            case PlanProposed(timed):
                self._note_plan(timed)
            case PlanEnded(outcome, reason):
                self._count(outcome, reason)
            case MigrationBegan(migration):
                self._begin_migration(migration)
            case RoundStalled(seconds):
                status.round_stall_seconds.add(seconds)
            case CommitStalled(seconds):
                status.commit_stall_seconds.add(seconds)
            case BatchCommitted(batch):
                self._add_batch(batch)
            case MigrationEnded(seconds, fault, proposal):
                self._end_migration(seconds, fault, proposal)
            case GenerationServed(generation):
                status.generation = generation
            case QuotasChanged():
                status.quota_changes += 1
            case WeightsReplaced():
                self._note_reload()
            case GotStuck(reason):
                self._note_stuck(reason)
            case GotUnstuck():
                status.stuck = 0
            case SlotsAudited(slots):
                status.audited_slots += slots
            case SlotCorrupted():
                self._note_corruption(event)
            case ErrorCaught(stage, reason):
                self._note_error(stage, reason)

    def _add_snapshot(
        self, sample: LoadSample, served: Served, earlier: ServedTokens | None
    ) -> None:
        """Add a snapshot's load, as what served it had it and as the loaded placement would have had it."""
        self.status.snapshots += 1
        if sample.step_seconds:
            self.status.step_seconds = sample.step_seconds
        if sample.routed:
            counts_ALE = sample.counts_ALE
            if earlier is not None:
                counts_ALE = counts_ALE - earlier.counts_ALE
            self._balance.add(counts_ALE, served, earlier)

    def _note_plan(self, timed: TimedProposal) -> None:
        """Note a plan that was made. Unless it was accepted, it has also ended."""
        proposal, status = timed.proposal, self.status
        status.plan_seconds.add(timed.seconds)
        status.last_decision = proposal.decision.reason
        self._note_expert_time(proposal.expert_time)
        if proposal.refused:
            self._note_error("gain", proposal.refused)
        # The gains are those of the last commit: this plan's load shows what it achieved.
        if proposal.achieved_gain is not None:
            status.achieved_gain = proposal.achieved_gain
            if status.commits:
                status.commits[-1].achieved_gain = proposal.achieved_gain
        if proposal.measured_gain is not None:
            self._note_measured(proposal.measured_gain)
        outcome = proposal.decision.outcome
        if outcome != "accepted":
            self._count(outcome, proposal.decision.reason)

    def _note_expert_time(self, expert_time: ExpertTime) -> None:
        low, high = expert_time.bounds
        status = self.status
        status.expert_time = {"low": low, "estimate": expert_time.fraction, "high": high}
        status.expert_time_learned = int(expert_time.source == "learned")
        status.expert_time_reason = expert_time.reason

    def _note_measured(self, measured: MeasuredGain) -> None:
        low, high = measured.bounds
        self.status.measured_gain = {"low": low, "estimate": measured.gain, "high": high}
        if self.status.commits:
            commit = self.status.commits[-1]
            commit.measured_gain = measured.gain
            commit.measured_gain_error = measured.standard_error

    def _begin_migration(self, migration: Migration) -> None:
        status = self.status
        status.migrating, status.moves_planned, status.moves_done = 1, migration.num_moves, 0
        self._before = Before(
            generation=status.generation,
            bytes=sum(status.migrated_bytes.values()),
        )

    def _add_batch(self, batch: Batch) -> None:
        for link in LINKS:
            self.status.migrated_experts[link] += batch.num_moves(link)
            self.status.migrated_bytes[link] += batch.num_bytes(link)
        self.status.moves_done += len(batch.moves)

    def _end_migration(self, seconds: float, fault: str, proposal: Proposal | None) -> None:
        status = self.status
        status.migrating = 0
        status.migration_seconds.add(seconds)
        gain = 0.0 if proposal is None else proposal.decision.predicted_gain
        if not fault:
            status.predicted_gain = gain
            status.last_commit_timestamp = time.time()
            if proposal is not None:
                promised_L = proposal.plan.imbalance_after_L
                status.predicted_imbalance = promised_L.tolist()
                status.overall_imbalance["predicted"] = float(promised_L.mean())
        # A migration with a fault may have committed batches before it.
        if status.generation != self._before.generation:
            self._note_commit(seconds, fault, gain)
        self._count("abandoned" if fault else "committed", fault or status.last_decision)

    def _note_commit(self, seconds: float, fault: str, predicted_gain: float) -> None:
        status, before = self.status, self._before
        commit = Commit(
            generation=status.generation,
            time=time.time(),
            seconds=seconds,
            experts=status.moves_done,
            bytes=sum(status.migrated_bytes.values()) - before.bytes,
            predicted_gain=predicted_gain,
            # No snapshot was taken since: all of them were served by what was served before.
            imbalance_before=self._balance.caught_up().served.overall() or 1.0,
            pp_rank=status.pp_rank,
            fault=fault,
        )
        status.commits = [*status.commits[1 - COMMITS_KEPT :], commit]

    def _note_reload(self) -> None:
        self.status.weight_reloads += 1
        self.status.message = (
            "the engine replaced its weights; experts are served as it loaded them"
        )
        if self._rank == 0:
            logger.warning("ep_rebalance: %s%s", self._spoken, self.status.message)

    def _count(self, outcome: PlanOutcome, reason: str) -> None:
        """Count and log what became of a plan."""
        self.status.plans[outcome] += 1
        self.status.message = reason
        if self._rank == 0:
            level = logging.WARNING if outcome in ("abandoned", "failed") else logging.INFO
            logger.log(
                level,
                "ep_rebalance: %splan %s, generation %d: %s",
                self._spoken,
                outcome,
                self.status.generation,
                reason,
            )

    def _note_corruption(self, event: SlotCorrupted) -> None:
        status = self.status
        corruption = Corruption(
            time=time.time(),
            layer=status.moe_layers[event.layer],
            expert=event.expert,
            slot=event.slot,
            ep_rank=event.ep_rank,
            source=event.source,
            pp_rank=status.pp_rank,
        )
        status.corruptions = [*status.corruptions[1 - CORRUPTIONS_KEPT :], corruption]
        status.corrupted_slots["lost" if event.source is None else "repaired"] += 1
        done = "no rank has it whole: answers are wrong until the weights are loaded again"
        if event.source is not None:
            done = f"it was written anew from slot {event.source}"
        status.message = (
            f"expert {event.expert} of layer {corruption.layer} had changed in slot {event.slot} of EP rank "
            f"{event.ep_rank}; {done}"
        )
        if self._rank in (0, event.ep_rank):
            logger.error("ep_rebalance: %s%s", self._spoken, status.message)

    def _note_error(self, stage: Stage, reason: str) -> None:
        """Count it, and log the first of its stage: others may follow with every snapshot."""
        self._errors[stage] += 1
        if self._errors[stage] == 1:
            logger.error(
                "ep_rebalance rank %d: %srefused in the stage %s: %s",
                self._rank,
                self._spoken,
                stage,
                reason,
            )

    def _note_stuck(self, reason: str) -> None:
        if not self.status.stuck and self._rank == 0:
            logger.error("ep_rebalance: %sstuck: %s", self._spoken, reason)
        self.status.stuck = 1
        self.status.message = reason


def _known(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if number is not None}


def _links(topology: Topology) -> dict[str, float]:
    """Of the kinds that there are; the topology also has figures of the others, which nobody measured."""
    speeds = dict(zip(LINKS, topology.bytes_per_second, strict=True))
    kinds = topology.links_between_ranks
    return {link: speeds[link] for link in kinds} | {"round_seconds": topology.round_seconds}


def initial_status(
    *,
    config: RebalanceConfig,
    model: str,
    placement: Placement,
    top_k: int,
    self_test: SelfTest = NOT_TRIED,
    topology: Topology | None = None,
    moe_layers: Sequence[int] = (),
    pipeline_stage: PipelineStage = ONLY_STAGE,
) -> Status:
    """A status in which every label that will be counted exists already, at zero.

    topology: of ranks that move experts.
    moe_layers: the numbers that the layers have in the engine's model; from 0 on if ().
    """
    return Status(
        started=time.time(),
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
        pp_rank=pipeline_stage.pp_rank,
        pp_size=pipeline_stage.pp_size,
        moe_layers=list(moe_layers or range(placement.num_layers)),
        config=config.as_dict(),
        links={} if topology is None else _links(topology),
        self_test=dict(self_test.verdicts),
        self_test_seconds=self_test.seconds,
        rank_tokens=[0] * placement.num_ranks,
        busiest_rank_tokens={"served": 0, "contiguous": 0},
        phase_tokens=dict.fromkeys(PHASES, 0),
        plans=dict.fromkeys(OUTCOMES, 0),
        corrupted_slots={"repaired": 0, "lost": 0},
        internal_errors=dict.fromkeys(STAGES, 0),
        migrated_experts=dict.fromkeys(LINKS, 0),
        migrated_bytes=dict.fromkeys(LINKS, 0),
    )
