"""Migrations within the limits that a configuration sets, the same in a server and in a replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.migration.batches import Migration
from ep_rebalance.migration.schedule import schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import staging_slots
from ep_rebalance.topology import Topology


def schedule_as_configured(
    config: RebalanceConfig,
    source: Placement,
    target: Placement,
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    rank: int | None = None,
) -> Migration:
    """See `schedule`, which also says what is raised."""
    return schedule(
        source,
        target,
        quotas_LP,
        topology=topology,
        expert_bytes_L=expert_bytes_L,
        max_bytes_per_round=config.migration.max_bytes_per_step,
        staging_slots=staging_slots(config.planner, source.slots_per_rank),
        rank=rank,
    )
