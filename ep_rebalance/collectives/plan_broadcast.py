"""Plan broadcast: an accepted plan goes from rank 0 to all ranks, as integers, so that every rank reads the
same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.host_memory import Download, UploadRing
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.problem import Plan

QUOTA_UNIT = 1 << 30
"""Quotas are sent as multiples of 1 / QUOTA_UNIT."""


class BroadcastPlan(NamedTuple):
    """What all ranks read: a plan's int32 [L, P] slots and float64 [L, P] quotas, and its pace."""

    slots_LP: NDArray[np.int32]
    quotas_LP: NDArray[np.float64]
    pace: Pace


class PlanBroadcast:
    """Sends plans from rank 0. The memory is reserved once.

    shape: numbers of layers and slots.
    """

    def __init__(
        self, *, group: dist.ProcessGroup, shape: tuple[int, int], device: torch.device
    ) -> None:
        self._group = group
        self._source = dist.get_global_rank(group, 0)
        layers, slots = shape
        # A row for each layer: its turn, slots and quotas. Before these, a row for the rest of the pace.
        self._wire = torch.zeros(1 + layers, 1 + 2 * slots, dtype=torch.int64, device=device)
        self._upload = UploadRing(self._wire.shape, torch.int64, device, depth=2)
        self._download = Download(self._wire)

    def begin(self, plan: Plan | None, pace: Pace | None = None) -> Download:
        """Broadcast a plan. Collective, in the same step on all ranks.

        plan, pace: rank 0's; None on all others, which receive them.

        Returns the download of what `read_plan` reads in a later step.
        """
        # All of it in stream order: upload, broadcast, download. The host waits for none of them here.
        if plan is not None and pace is not None:
            self._put(plan, pace)
        dist.broadcast(self._wire, src=self._source, group=self._group)
        self._download.start(self._wire)
        return self._download

    def warm_up(self) -> None:
        """Collective, before serving: the first broadcast connects the ranks, which takes long."""
        self.begin(None).result()

    def _put(self, plan: Plan, pace: Pace) -> None:
        host = self._upload.next().numpy()
        slots = plan.placement.num_slots
        host[0, :3] = pace.max_bytes, pace.max_internode_bytes, pace.hurried
        host[1:, 0] = -1  # for layers that `pace.layers` leaves out
        host[1:, 0][list(pace.layers)] = np.arange(len(pace.layers))
        host[1:, 1 : 1 + slots] = plan.placement.slots_LP
        host[1:, 1 + slots :] = np.rint(plan.quotas_LP * QUOTA_UNIT)
        self._upload.upload(self._wire)


def read_plan(wire: NDArray[np.int64]) -> BroadcastPlan:
    """The plan that was broadcast.

    wire: int64 [1 + L, 1 + 2 P], as `PlanBroadcast` lays it out.
    """
    max_bytes, max_internode_bytes, hurried = wire[0, :3].tolist()
    turn_L, (slots_LP, quota_units_LP) = wire[1:, 0], np.split(wire[1:, 1:], 2, axis=1)
    in_turn = np.argsort(turn_L)
    return BroadcastPlan(
        slots_LP.astype(np.int32),
        quota_units_LP / QUOTA_UNIT,
        Pace(
            max_bytes=max_bytes,
            max_internode_bytes=max_internode_bytes,
            layers=tuple(in_turn[turn_L[in_turn] >= 0].tolist()),
            hurried=bool(hurried),
        ),
    )
