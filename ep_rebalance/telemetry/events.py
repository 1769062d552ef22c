"""Events: what stages tell of, each once. `Journal.apply` alone turns them into the status and the log."""

from __future__ import annotations

from dataclasses import dataclass

from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.batches import Batch, Migration
from ep_rebalance.migration.served import Served
from ep_rebalance.planning.proposal import Proposal, TimedProposal
from ep_rebalance.telemetry.metrics import Activity, PlanOutcome


@dataclass(frozen=True, slots=True)
class ActivityBegan:
    activity: Activity


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """sample: counted while `served` was served."""

    sample: LoadSample
    served: Served


@dataclass(frozen=True, slots=True)
class PlanProposed:
    """Rank 0 has a plan, accepted or refused."""

    timed: TimedProposal


@dataclass(frozen=True, slots=True)
class PlanEnded:
    """What became of a plan that experts never moved for."""

    outcome: PlanOutcome
    reason: str


@dataclass(frozen=True, slots=True)
class MigrationBegan:
    migration: Migration


@dataclass(frozen=True, slots=True)
class RoundStalled:
    seconds: float


@dataclass(frozen=True, slots=True)
class CommitStalled:
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchCommitted:
    batch: Batch


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """seconds: from the first round to the last commit.
    fault: why the rest was given up, or "" if all batches are served.
    proposal: what was carried out; None on every rank but 0.
    """

    seconds: float
    fault: str
    proposal: Proposal | None


@dataclass(frozen=True, slots=True)
class GenerationServed:
    generation: int


@dataclass(frozen=True, slots=True)
class QuotasChanged:
    """Tokens are split otherwise; no expert moved."""


@dataclass(frozen=True, slots=True)
class WeightsReplaced:
    """The engine replaced weights of this rank."""


@dataclass(frozen=True, slots=True)
class GotStuck:
    """Something takes too long; serving goes on with the placement as it is."""

    reason: str


@dataclass(frozen=True, slots=True)
class GotUnstuck:
    """What took too long is over."""


Event = (
    ActivityBegan
    | SnapshotTaken
    | PlanProposed
    | PlanEnded
    | MigrationBegan
    | RoundStalled
    | CommitStalled
    | BatchCommitted
    | MigrationEnded
    | GenerationServed
    | QuotasChanged
    | WeightsReplaced
    | GotStuck
    | GotUnstuck
)
