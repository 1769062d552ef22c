"""A trace summed up: as a whole, and in a few parts of as many snapshots that follow each other.

Letters of this module: `W` parts; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.trace import Record, RecordedSnapshot
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.run import NO_STEPS, NothingRecorded

_MOST_PARTS = 8
"""As many snapshots or fewer are a part each; parts are joined in pairs while there are more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """What was recorded.

    mean: all snapshots as one.
    counts_WALE: int64 [W, A, L, E], tokens. Of each part, in order; the last one may be shorter.
    steps_W: int64 [W]. Engine steps of each part.
    """

    mean: RecordedSnapshot
    counts_WALE: NDArray[np.int64]
    steps_W: NDArray[np.int64]

    def load_WLE(self, phase: str | None = None) -> NDArray[np.int64]:
        """int64 [W, L, E], tokens. phase: of PHASES; None for all of them."""
        if phase is None:
            total_WLE: NDArray[np.int64] = self.counts_WALE.sum(axis=1)
            return total_WLE
        return self.counts_WALE[:, PHASES.index(phase)]

    @property
    def phases(self) -> tuple[str, ...]:
        """Those that have tokens."""
        has_A: NDArray[np.bool_] = np.any(self.counts_WALE, axis=(0, 2, 3))
        return tuple(phase for phase, has in zip(PHASES, has_A, strict=True) if has)


def sum_up(records: Iterable[Record]) -> Recording:
    """Read a trace once, in memory that does not grow with it.

    Raises NothingRecorded, and what reading the records raises.
    """
    parts: list[_Part] = []
    snapshots_each = 1
    last: RecordedSnapshot | None = None
    for record in records:
        if not isinstance(record, RecordedSnapshot) or not record.counts_ALE.any():
            continue
        if not parts or parts[-1].snapshots == snapshots_each:
            if len(parts) == _MOST_PARTS:
                parts = [
                    one.joined(next_) for one, next_ in zip(parts[::2], parts[1::2], strict=True)
                ]
                snapshots_each *= 2
            parts.append(
                _Part(snapshots=0, steps=0, counts_ALE=np.zeros_like(record.counts_ALE, np.int64))
            )
        one = _Part(snapshots=1, steps=record.steps, counts_ALE=record.counts_ALE.astype(np.int64))
        parts[-1] = parts[-1].joined(one)
        last = record
    if last is None:
        raise NothingRecorded("the trace holds no snapshot with tokens; record while it serves")
    counts_WALE = np.array([part.counts_ALE for part in parts])
    steps_W = np.array([part.steps for part in parts])
    if not steps_W.any():
        raise NothingRecorded(NO_STEPS)
    return Recording(
        mean=RecordedSnapshot(
            counts_ALE=counts_WALE.sum(axis=0),
            step=last.step,
            steps=int(steps_W.sum()),
            step_seconds=last.step_seconds,
            time=last.time,
            generation=0,
        ),
        counts_WALE=counts_WALE,
        steps_W=steps_W,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Some snapshots as one. counts_ALE: int64 [A, L, E], tokens."""

    snapshots: int
    steps: int
    counts_ALE: NDArray[np.int64]

    def joined(self, later: _Part) -> _Part:
        return _Part(
            snapshots=self.snapshots + later.snapshots,
            steps=self.steps + later.steps,
            counts_ALE=self.counts_ALE + later.counts_ALE,
        )
