"""Events: what stages report, each event once. `Journal.apply` turns them into the status and the log."""

from __future__ import annotations

from dataclasses import dataclass

from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.batches import Batch, Migration
from ep_rebalance.migration.served import Served, ServedTokens
from ep_rebalance.planning.proposal import Proposal, TimedProposal
from ep_rebalance.telemetry.metrics import Activity, PlanOutcome, Stage


@dataclass(frozen=True, slots=True)
class ActivityBegan:
    """The loop does something else from now on."""

    activity: Activity


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """All ranks have a snapshot.

    sample: counted while `served` was served, but for `earlier`.
    earlier: those of its tokens that were computed before their layer was committed; None if no layer was.
    """

    sample: LoadSample
    served: Served
    earlier: ServedTokens | None = None


@dataclass(frozen=True, slots=True)
class PlanProposed:
    """Rank 0 has a plan, accepted or refused."""

    timed: TimedProposal


@dataclass(frozen=True, slots=True)
class PlanEnded:
    """A plan ended without a migration.

    reason: a sentence, or part of one, for the log and the status.
    """

    outcome: PlanOutcome
    reason: str


@dataclass(frozen=True, slots=True)
class MigrationBegan:
    """The first round of a migration is next."""

    migration: Migration


@dataclass(frozen=True, slots=True)
class RoundStalled:
    """Serving waited for a migration round."""

    seconds: float


@dataclass(frozen=True, slots=True)
class CommitStalled:
    """Serving waited for a commit."""

    seconds: float


@dataclass(frozen=True, slots=True)
class BatchCommitted:
    """A batch's experts are served in their new slots on this rank."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """A migration ended.

    seconds: from the first round to the last commit.
    fault: why the rest was given up; "" if all batches are served.
    proposal: what was carried out; None on every rank but 0.
    """

    seconds: float
    fault: str
    proposal: Proposal | None


@dataclass(frozen=True, slots=True)
class GenerationServed:
    """A migration, a restored placement or a reload is served under this number, which may be the old one."""

    generation: int


@dataclass(frozen=True, slots=True)
class QuotasChanged:
    """Tokens are split differently over the replicas; no expert moved."""


@dataclass(frozen=True, slots=True)
class WeightsReplaced:
    """The engine replaced weights of this rank."""


@dataclass(frozen=True, slots=True)
class GotStuck:
    """The loop cannot go on for now; serving goes on with the placement as it is."""

    reason: str


@dataclass(frozen=True, slots=True)
class GotUnstuck:
    """The loop goes on."""


@dataclass(frozen=True, slots=True)
class SlotsAudited:
    """So many slots were checked, on all ranks."""

    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCorrupted:
    """A slot did not hold the bytes that were written into it.

    layer: index of the layer.
    slot: counted over all ranks; `ep_rank` has it.
    source: the slot from which it was written anew; None if no rank has the expert whole.
    """

    layer: int
    expert: int
    slot: int
    ep_rank: int
    source: int | None


@dataclass(frozen=True, slots=True)
class ErrorCaught:
    """A stage raised, or refused a value that cannot be; serving goes on.

    reason: a clause.
    """

    stage: Stage
    reason: str


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
    | SlotsAudited
    | SlotCorrupted
    | ErrorCaught
)
