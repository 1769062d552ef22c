"""Plan broadcast: an accepted plan goes from rank 0 to all ranks, as integers, so that every rank reads the
same bits.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.host_memory import Download, UploadRing
from ep_rebalance.planning.problem import Plan

QUOTA_UNIT = 1 << 30
"""Quotas are sent as multiples of 1 / QUOTA_UNIT."""


class PlanBroadcast:
    """Sends plans from rank 0. The memory is reserved once.

    shape: numbers of layers and slots.
    """

    def __init__(
        self, *, group: dist.ProcessGroup, shape: tuple[int, int], device: torch.device
    ) -> None:
        self._group = group
        self._source = dist.get_global_rank(group, 0)
        self._wire_2LP = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        self._upload = UploadRing(self._wire_2LP.shape, torch.int64, device, depth=2)
        self._download = Download(self._wire_2LP)

    def begin(self, plan: Plan | None) -> Download:
        """Broadcast a plan. Collective, in the same step on all ranks.

        plan: rank 0's; None on all others, which receive it.

        Returns the download of int64 [2, L, P], to be read with `read_plan` in a later step.
        """
        # All of it in stream order: upload, broadcast, download. The host waits for none of them here.
        if plan is not None:
            self._put(plan)
        dist.broadcast(self._wire_2LP, src=self._source, group=self._group)
        self._download.start(self._wire_2LP)
        return self._download

    def warm_up(self) -> None:
        """Collective, before serving: the first broadcast connects the ranks, which takes long."""
        self.begin(None).result()

    def _put(self, plan: Plan) -> None:
        host_2LP = self._upload.next().numpy()
        host_2LP[0] = plan.placement.slots_LP
        host_2LP[1] = np.rint(plan.quotas_LP * QUOTA_UNIT)
        self._upload.upload(self._wire_2LP)


def read_plan(wire_2LP: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """(slots_LP, quotas_LP) of a plan that was broadcast.

    wire_2LP: int64 [2, L, P]. Slots, and quotas in units of 1 / QUOTA_UNIT.
    """
    slots_LP, quota_units_LP = wire_2LP
    return slots_LP.astype(np.int32), quota_units_LP / QUOTA_UNIT
