"""Plan broadcast: an accepted plan from rank 0 to all ranks, as integers, so that every rank reads
the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.planning.plan import Plan
from ep_rebalance.transport.host_copy import HostCopy

QUOTA_UNIT = 1 << 30
"""Quotas travel as multiples of one over this."""


class PlanBroadcast:
    """shape: layers and slots. The memory is reserved once."""

    def __init__(
        self, *, group: dist.ProcessGroup, shape: tuple[int, int], device: torch.device
    ) -> None:
        self._group = group
        self._wire_2LP = torch.zeros(2, *shape, dtype=torch.int64, device=device)

    def put(self, plan: Plan) -> None:
        """On rank 0: what the next broadcast sends."""
        quota_units_LP = np.rint(plan.quotas_LP * QUOTA_UNIT).astype(np.int64)
        wire_2LP = np.stack([plan.placement.slots_LP.astype(np.int64), quota_units_LP])
        self._wire_2LP.copy_(torch.from_numpy(wire_2LP))

    def begin(self) -> HostCopy:
        """On all ranks in the same step: int64 [2, L, P], to be read with `read_plan`."""
        source = dist.get_global_rank(self._group, 0)
        dist.broadcast(self._wire_2LP, src=source, group=self._group)
        return HostCopy(self._wire_2LP)


def read_plan(wire_2LP: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """(slots_LP, quotas_LP) of what was broadcast."""
    slots_LP, quota_units_LP = wire_2LP
    return slots_LP.astype(np.int32), quota_units_LP / QUOTA_UNIT
