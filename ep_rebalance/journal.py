"""Writes what happened into the `Status` and the log."""

from __future__ import annotations

import logging
import time

import numpy as np

from ep_rebalance import __version__
from ep_rebalance.background import TimedProposal
from ep_rebalance.commit import Served
from ep_rebalance.config import MetricsConfig, RebalanceConfig
from ep_rebalance.expert_load import ExpertLoad, expert_load
from ep_rebalance.load_window import PHASES
from ep_rebalance.metrics import OUTCOMES, Status
from ep_rebalance.migration import Batch
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.snapshot import Snapshot
from ep_rebalance.topology import LINKS

logger = logging.getLogger(__name__)


class Journal:
    """Every rank keeps one; only rank 0's is shown and logged."""

    def __init__(self, status: Status, *, contiguous: Placement, rank: int) -> None:
        self.status = status
        self._contiguous = contiguous
        self._contiguous_quotas_LP = contiguous.even_quotas_LP()
        self._rank = rank
        self._promised: list[float] = []
        self._predicted_gain = 0.0
        phases, layers, experts = len(PHASES), contiguous.num_layers, contiguous.num_experts
        self._tokens_ALE = np.zeros((phases, layers, experts), dtype=np.int64)

    def report(self, served: Served, metrics: MetricsConfig) -> Status:
        """The status, with what only optional metrics show if they are on."""
        if metrics.replicas:
            self.status.replicas = (served.placement.replica_counts_LE() - 1).sum(1).tolist()
        if metrics.expert_tokens:
            self.status.expert_tokens = self._tokens_ALE.sum(0).tolist()
        return self.status

    def load(self, served: Served) -> ExpertLoad:
        """What every expert got since the start, and where it is served now."""
        return expert_load(self.status, self._tokens_ALE, served)

    def snapshot(self, snapshot: Snapshot, served: Served) -> None:
        """Measure the load that the served placement got, and what the loaded one would have got."""
        sample, status = snapshot.sample, self.status
        status.snapshots += 1
        load_LE = sample.counts_ALE.sum(0)
        if not load_LE.any():
            return
        self._tokens_ALE += sample.counts_ALE
        rank_load_LR = served.placement.rank_load_LR(load_LE, served.quotas_LP)
        status.imbalance = imbalance_L(rank_load_LR).tolist()
        contiguous_LR = self._contiguous.rank_load_LR(load_LE, self._contiguous_quotas_LP)
        status.contiguous_imbalance = imbalance_L(contiguous_LR).tolist()
        status.step_seconds = sample.step_seconds
        for rank, tokens in enumerate(rank_load_LR.sum(0)):
            status.rank_tokens[rank] += round(tokens)
        pairs_per_token = int(status.info["top_k"]) * status.layers
        for phase, counts_LE in zip(PHASES, sample.counts_ALE, strict=True):
            status.phase_tokens[phase] += int(counts_LE.sum()) // pairs_per_token

    def proposal(self, timed: TimedProposal) -> None:
        """A plan was made; unless it was accepted, that is the end of it."""
        proposal = timed.proposal
        self.status.plan_seconds.add(timed.seconds)
        self.status.last_decision = proposal.decision.reason
        if proposal.achieved_gain is not None:
            self.status.achieved_gain = proposal.achieved_gain
        self._promised = proposal.plan.imbalance_after_L.tolist()
        self._predicted_gain = proposal.decision.predicted_gain
        if not proposal.decision.accepted:
            self.outcome(proposal.decision.outcome, proposal.decision.reason)

    def migration_began(self) -> None:
        self.status.migrating = 1

    def round_stalled(self, seconds: float) -> None:
        self.status.round_stall_seconds.add(seconds)

    def committed(self, batch: Batch, expert_bytes_L: tuple[int, ...], seconds: float) -> None:
        """A batch is served."""
        for move in batch.moves:
            self.status.migrated_experts[move.link] += 1
            self.status.migrated_bytes[move.link] += expert_bytes_L[move.layer]
        self.status.commit_stall_seconds.add(seconds)

    def migration_ended(self, seconds: float, fault: str) -> None:
        """All batches are served, or the rest was given up because of `fault`."""
        self.status.migrating = 0
        self.status.migration_seconds.add(seconds)
        if fault:
            self.outcome("abandoned", fault)
        else:
            self.status.predicted_imbalance = self._promised
            self.status.predicted_gain = self._predicted_gain
            self.status.last_commit_timestamp = time.time()
            self.outcome("committed", self.status.last_decision)

    def generation(self, generation: int) -> None:
        self.status.generation = generation

    def outcome(self, outcome: str, reason: str) -> None:
        """Count what became of a plan."""
        self.status.plans[outcome] += 1
        self.status.message = reason
        if self._rank == 0:
            level = logging.WARNING if outcome in ("abandoned", "failed") else logging.INFO
            generation = self.status.generation
            logger.log(
                level, "ep_rebalance: plan %s, generation %d: %s", outcome, generation, reason
            )

    def stuck(self, reason: str) -> None:
        """Something takes too long; serving goes on with the placement as it is."""
        if not self.status.stuck:
            logger.error("ep_rebalance: stuck: %s", reason)
        self.status.stuck = 1
        self.status.message = reason

    def unstuck(self) -> None:
        self.status.stuck = 0


def initial_status(
    *, config: RebalanceConfig, model: str, placement: Placement, top_k: int
) -> Status:
    """A status in which every label that will be counted exists already, at zero."""
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
        config=config.shown(),
        rank_tokens=[0] * placement.num_ranks,
        phase_tokens=dict.fromkeys(PHASES, 0),
        plans=dict.fromkeys(OUTCOMES, 0),
        migrated_experts=dict.fromkeys(LINKS, 0),
        migrated_bytes=dict.fromkeys(LINKS, 0),
    )
