"""Snapshot: the counts and flags of all ranks, summed in one all-reduce.

It is the only collective that steady traffic costs: `2 L E + 9` integers every `snapshot_steps`
steps. All decisions that ranks must take in the same step are taken from what it returns, which is
equal on every rank.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist

from ep_rebalance.counts import DeviceCounts
from ep_rebalance.load_window import LoadSample
from ep_rebalance.step_times import StepSum
from ep_rebalance.transport.host_copy import HostCopy


@dataclass(frozen=True, slots=True)
class Flags:
    """What a rank tells the others; in a `Snapshot`, how many ranks said so.

    planned: rank 0's plan is done. proposed: and it is to be carried out. scheduled: the rank has
    worked out its migration. failed: it could not. fitted: it has quotas that follow the load.
    paused, plan_asked: what an operator asked rank 0 for.
    """

    planned: int = 0
    proposed: int = 0
    scheduled: int = 0
    failed: int = 0
    fitted: int = 0
    paused: int = 0
    plan_asked: int = 0


HEAD = len(fields(Flags)) + 2
"""Integers before the counts: flags, busy steps and their microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Equal on every rank."""

    sample: LoadSample
    flags: Flags


class SnapshotExchange:
    """Sums counts and flags over `group` in one step and hands them out in a later one."""

    def __init__(self, *, group: dist.ProcessGroup, counts: DeviceCounts) -> None:
        self._group = group
        self._counts = counts
        phases_LAE = counts.counts_LAE[:, :2]
        self._shape = phases_LAE.shape
        self._buffer = torch.zeros(
            phases_LAE.numel() + HEAD, dtype=torch.int64, device=counts.counts_LAE.device
        )
        self._steps = 0

    def begin(self, flags: Flags, steps: StepSum) -> HostCopy:
        """Sum and clear the counters. steps: those of this rank since the snapshot before."""
        head = [*astuple(flags), steps.busy_steps, round(steps.busy_seconds * 1e6)]
        counts_LAE = self._counts.counts_LAE
        self._buffer[:HEAD].copy_(torch.tensor(head), non_blocking=True)
        self._buffer[HEAD:].copy_(counts_LAE[:, :2].reshape(-1))
        counts_LAE.zero_()
        self._steps = steps.steps
        dist.all_reduce(self._buffer, group=self._group)
        return HostCopy(self._buffer)

    def finish(self, copy: HostCopy) -> Snapshot:
        """The sums that `begin` started."""
        values = copy.result().numpy()
        *flags, busy_steps, microseconds = (int(value) for value in values[:HEAD])
        counts_ALE = values[HEAD:].reshape(self._shape).transpose(1, 0, 2).copy()
        return Snapshot(
            sample=LoadSample(
                counts_ALE=counts_ALE,
                steps=self._steps,
                step_seconds=microseconds / 1e6 / max(busy_steps, 1),
            ),
            flags=Flags(*flags),
        )
