"""Migrations within the limits that a configuration sets, the same in a server and in a replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.migration.batches import Migration
from ep_rebalance.migration.schedule import schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.policies import staging_slots
from ep_rebalance.topology import Topology


def schedule_as_configured(
    config: RebalanceConfig,
    source: Placement,
    target: Placement,
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    pace: Pace,
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
        pace=pace,
        staging_slots=configured_staging(config, source.slots_per_rank, expert_bytes_L),
        rank=rank,
    )


def configured_staging(
    config: RebalanceConfig, slots_per_rank: int, expert_bytes_L: Sequence[int]
) -> int:
    """How many experts the staging memory of a rank holds; see `staging_slots`."""
    limit = config.migration.max_staging_bytes
    return staging_slots(config.planner, limit, slots_per_rank, expert_bytes_L)
