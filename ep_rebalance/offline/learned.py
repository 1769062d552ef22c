"""What a trace tells of the experts' part of a step, all of it taken together."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import Record, RecordedPlacement, TraceHead
from ep_rebalance.offline.peers import AsRecorded
from ep_rebalance.offline.step_time import recorded_by_own_counts
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.expert_time import (
    LEAST_SNAPSHOTS,
    ExpertTime,
    StepRecord,
    as_known,
    assumed,
    unlearned,
)


def expert_time(
    head: TraceHead, records: Iterable[Record], settings: RebalanceConfig
) -> ExpertTime:
    """The fraction of the recorded steps that waited for the busiest ranks' experts.

    settings: if they set `decision.expert_time_fraction`, it is that. Otherwise it is learned as a server
        learns it, but from all of the trace, each snapshot counting alike, and at the trace's mean load.

    Costs are tokens, and of all phases: what step times are scaled with.

    Raises what reading the records raises.
    """
    setting = settings.decision.expert_time_fraction
    if setting != "auto":
        return unlearned(setting)
    if head.origin:
        return assumed("no server was recorded, so there are no step times")
    seen = StepRecord(
        cost=TokenCost(),
        by_own_counts=recorded_by_own_counts(head),
        snapshots=None,
        half_life=math.inf,
    )
    served: AsRecorded | None = None
    for record in records:
        if not isinstance(record, RecordedPlacement):
            if served is not None:
                served.snapshot(record)
                seen.add([record.sample(served.placement, served.quotas_LP)])
        elif served is None:
            served = AsRecorded(record.placement, settings)
            served.change(record)
        else:
            served.change(record)
    model, work = seen.model(), seen.mean()
    if model is None or work is None:
        return assumed(f"fewer than {LEAST_SNAPSHOTS} snapshots were timed")
    return as_known(model.waiting(work))
