"""Step times: how many engine steps one rank took, how long they were, and which moved experts.

On an accelerator the host only launches the work of a step, so the time that it spends on one says
little. A step takes as long as the interval between its end and the end of the step before it,
provided that the engine had work all the time, which it had if some request is in both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

STEPS_KEPT = 65_536
"""How many busy steps are kept for `StepTimes.take_recent`."""
LONGEST_SECONDS = 24 * 3600.0
"""What seems longer is no step but a clock that was set, or an adapter's mistake."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """One engine step of this rank.

    began: seconds. When the previous step ended if this one continued it, otherwise when the inputs of
        this one were prepared.
    ended: seconds.
    migrated: whether the step also moved experts.

    Times are those of `time.perf_counter`, which on Linux is the same clock in all processes.
    """

    began: float
    ended: float
    migrated: bool

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSum:
    """The steps since the previous snapshot.

    steps: all of them, with or without tokens on this rank.
    continued: those that continued the step before them.
    continued_seconds: the intervals from end to end of these.
    alone: all other steps in which this rank had tokens.
    alone_seconds: the host's time from the inputs of these to their end.
    untimed: steps of either kind whose time cannot be, which are in none of the above but `steps`.
    """

    steps: int = 0
    continued: int = 0
    continued_seconds: float = 0.0
    alone: int = 0
    alone_seconds: float = 0.0
    untimed: int = 0


class StepTimes:
    """Sums for the next snapshot, and the newest STEPS_KEPT busy steps one by one."""

    def __init__(self) -> None:
        self._recent: deque[StepTime] = deque(maxlen=STEPS_KEPT)
        self._busy_since: float | None = None
        self._reset()

    def begin(self) -> None:
        """Count a step that has been computed; how long it took is not known yet."""
        self._steps += 1

    def end(self, started: float | None, ended: float, *, continues: bool, migrated: bool) -> None:
        """Add the time of the same step once it has ended.

        started: seconds. None if this rank had no tokens in the step.
        ended: seconds.
        continues: whether some request was also in the step before; that counts only if this rank had
            tokens in that step.
        """
        before, self._busy_since = self._busy_since, None if started is None else ended
        if started is None:
            return
        since = before if continues else None
        step = StepTime(started if since is None else since, ended, migrated)
        if not 0.0 <= step.seconds <= LONGEST_SECONDS:  # also if it is not a number
            self._untimed += 1
            if since is not None:  # else it is the adapter's `started` that cannot be
                self._busy_since = None
            return
        if since is None:
            self._alone += 1
            self._alone_seconds += step.seconds
        else:
            self._continued += 1
            self._continued_seconds += step.seconds
        self._recent.append(step)

    def take_sum(self) -> StepSum:
        """The sums since the last call, which the next snapshot reports."""
        total = StepSum(
            steps=self._steps,
            continued=self._continued,
            continued_seconds=self._continued_seconds,
            alone=self._alone,
            alone_seconds=self._alone_seconds,
            untimed=self._untimed,
        )
        self._reset()
        return total

    def take_recent(self) -> list[StepTime]:
        """The busy steps since the last call, oldest first."""
        taken = list(self._recent)
        self._recent.clear()
        return taken

    def _reset(self) -> None:
        self._steps = self._continued = self._alone = self._untimed = 0
        self._continued_seconds = self._alone_seconds = 0.0
