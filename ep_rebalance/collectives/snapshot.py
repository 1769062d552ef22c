"""Snapshot: the counts and flags of all ranks, summed in one all-reduce.

It is the only collective that steady traffic costs: `2 L E` integers and a few more every
`snapshot_steps` steps, twice as many after a migration. Its result is equal on every rank, and all
decisions that ranks must take in the same step are based on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.host_memory import Download, UploadRing
from ep_rebalance.load.step_times import StepSum
from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import RoutingTables


@dataclass(frozen=True, slots=True)
class Flags:
    """What a rank tells the others; in `SnapshotSums`, the sums over all ranks.

    planned: rank 0's plan is done.
    proposed: and it is to be carried out.
    scheduled: the rank has worked out the rounds of the migration.
    failed: it could not.
    fitted: it has quotas that follow the load.
    paused, plan_asked: what an operator asked rank 0 for.
    reloads: how often the engine has replaced the rank's weights.
    reloads_squared: the square of that: the two sums show whether it is the same on all ranks.
    audit_asked: an operator asked rank 0 for a check of all slots.
    audited: slots that the rank has checked.
    corrupted: one that it found corrupted, as `1 + layer * P + slot`; 0 if none was. Ranks name theirs in
        turns, so that the sum over all ranks is that of one.
    """

    planned: int = 0
    proposed: int = 0
    scheduled: int = 0
    failed: int = 0
    fitted: int = 0
    paused: int = 0
    plan_asked: int = 0
    reloads: int = 0
    reloads_squared: int = 0
    audit_asked: int = 0
    audited: int = 0
    corrupted: int = 0


_FLAGS = attrgetter(*(field.name for field in fields(Flags)))

HEAD = len(fields(Flags)) + 4
"""Integers before the counts: the flags, then steps and microseconds of both kinds in `StepSum`."""

MOST_TOKENS = 2.0**53
"""Beyond it a float64 does not hold every whole number, and no snapshot comes near."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSums:
    """Sums over all ranks, equal on every rank.

    earlier_ALE: int64 [A, L, E], tokens. Of the sample's, those that were computed before their layer was
        committed in this window; None if none was.
    refused: why the counts were not taken, as a clause; "" if they were. The sample then holds none.
    """

    sample: LoadSample
    flags: Flags
    earlier_ALE: NDArray[np.int64] | None = None
    refused: str = ""


class SnapshotExchange:
    """Sums counts and flags over `group` in one step, and returns them in a later one."""

    def __init__(self, *, group: dist.ProcessGroup, counts: RoutingTables) -> None:
        self._group = group
        self._counters_LAE = counts.counts_LAE
        layers, _, experts = self._counters_LAE.shape
        shape_ALE, device = (len(PHASES), layers, experts), self._counters_LAE.device
        size = math.prod(shape_ALE)
        self._buffer = torch.zeros(HEAD + 2 * size, dtype=torch.int64, device=device)
        self._usual = self._buffer[: HEAD + size]
        self._head, self._sums_ALE = self._buffer[:HEAD], self._usual[HEAD:].view(shape_ALE)
        self._earlier_ALE = self._buffer[HEAD + size :].view(shape_ALE)
        self._counted_ALE = self._counters_LAE[:, : len(PHASES)].transpose(0, 1)
        self._earlier_LAE = counts.earlier_LAE
        self._heads = UploadRing((HEAD,), torch.int64, device)
        self._download = Download(self._usual)
        self._earlier_download = Download(self._earlier_ALE)
        self._steps, self._has_earlier = 0, False
        self._ever_continued = False

    def warm_up(self) -> None:
        """Collective, before anything is counted: connects the ranks and loads the kernels of a snapshot."""
        self.begin(Flags(), StepSum())
        self._download.result()

    def begin(self, flags: Flags, steps: StepSum, *, earlier: bool = False) -> None:
        """Sum and clear the counters. Collective, in the same step on all ranks.

        flags: this rank's.
        steps: this rank's since the previous snapshot.
        earlier: whether any layer was committed since then; the same on all ranks.
        """
        self._heads.next().numpy()[:] = (*_FLAGS(flags), *_timed(steps))
        self._heads.upload(self._head)
        # In stream order: after the kernels of this step have counted, before those of the next one do.
        self._sums_ALE.copy_(self._counted_ALE)
        self._counters_LAE.zero_()
        self._steps, self._has_earlier = steps.steps, earlier
        if earlier:
            self._earlier_ALE.copy_(self._earlier_LAE.transpose(0, 1))
            self._earlier_LAE.zero_()
        dist.all_reduce(self._buffer if earlier else self._usual, group=self._group)
        self._download.start(self._usual)
        if earlier:
            self._earlier_download.start(self._earlier_ALE)

    def finish(
        self,
        generation: int,
        placement: Placement | None = None,
        quotas_LP: NDArray[np.float64] | None = None,
    ) -> SnapshotSums:
        """The sums that `begin` started.

        Arguments say what the counted tokens were served with, see `LoadSample`.
        """
        values = self._download.result().numpy()
        flags, times = values[: HEAD - 4].tolist(), values[HEAD - 4 : HEAD].tolist()
        counts_ALE = values[HEAD:].reshape(self._sums_ALE.shape).copy()
        earlier_ALE: NDArray[np.int64] | None = None
        refused = _impossible(counts_ALE)
        if self._has_earlier and not refused:
            earlier_ALE = self._earlier_download.result().numpy().copy()
            refused = _impossible(earlier_ALE)
            counts_ALE += earlier_ALE
        if refused:
            counts_ALE[:], earlier_ALE = 0, None
        return SnapshotSums(
            sample=LoadSample(
                counts_ALE=counts_ALE,
                steps=self._steps,
                step_seconds=self._step_seconds(*times),
                generation=generation,
                placement=placement,
                quotas_LP=quotas_LP,
            ),
            flags=Flags(*flags),
            earlier_ALE=earlier_ALE,
            refused=refused,
        )

    def _step_seconds(
        self, continued: int, continued_microseconds: int, alone: int, alone_microseconds: int
    ) -> float:
        """Mean time of the steps that continued the one before, over all ranks.

        Other steps are timed on the host alone, which on an accelerator gives too little. They are used
        only as long as no step has ever continued another, as when only prompts are computed. A clock that
        was set back has timed nothing: 0.
        """
        self._ever_continued = self._ever_continued or continued > 0
        if self._ever_continued:
            return max(continued_microseconds, 0) / 1e6 / max(continued, 1)
        return max(alone_microseconds, 0) / 1e6 / max(alone, 1)


def _impossible(counts_ALE: NDArray[np.int64]) -> str:
    """Why these cannot be numbers of tokens, as after a fault of the memory that counted them; "" if they
    can.
    """
    if counts_ALE.min() < 0:
        return f"a count of {counts_ALE.min()} tokens"
    if (total := float(counts_ALE.sum(dtype=np.float64))) > MOST_TOKENS:
        return f"counts of {total:.3g} tokens"
    return ""


def _timed(steps: StepSum) -> tuple[int, int, int, int]:
    return (
        steps.continued,
        round(steps.continued_seconds * 1e6),
        steps.alone,
        round(steps.alone_seconds * 1e6),
    )
