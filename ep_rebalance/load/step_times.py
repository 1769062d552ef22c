"""Engine steps of one rank: how many, how long, and which of them moved experts.

The host only launches a step's work on an accelerator, so the time that it spends on a step says
little. What a step takes is the interval between the ends of two steps, as long as the engine had
work all the time: where a request is in both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

STEPS_KEPT = 65_536


@dataclass(frozen=True, slots=True)
class StepTime:
    """One engine step of this rank: when, and whether it also moved experts.

    began: end of the step before if this one continued it, else when its inputs were prepared.
    began, ended: seconds of `time.perf_counter`, on Linux the same clock in all processes.
    """

    began: float
    ended: float
    migrated: bool

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSum:
    """Steps since the snapshot before.

    continued: steps that continued the one before, and their intervals. alone: all other steps in
    which this rank had tokens, and the host's time from their inputs to their end.
    """

    steps: int = 0
    continued: int = 0
    continued_seconds: float = 0.0
    alone: int = 0
    alone_seconds: float = 0.0


class StepTimes:
    """Sums for the next snapshot, and the newest STEPS_KEPT busy steps one by one."""

    def __init__(self) -> None:
        self._recent: deque[StepTime] = deque(maxlen=STEPS_KEPT)
        self._busy_since: float | None = None
        self._reset()

    def begin(self) -> None:
        """A step has been computed; its time is not known yet."""
        self._steps += 1

    def end(self, started: float | None, ended: float, *, continues: bool, migrated: bool) -> None:
        """The same step is over.

        started: None if this rank had no tokens in it. continues: some request was in the step before
        as well; believed only if that step ended here.
        """
        before, self._busy_since = self._busy_since, None if started is None else ended
        if started is None:
            return
        if continues and before is not None:
            step = StepTime(before, ended, migrated)
            self._continued += 1
            self._continued_seconds += step.seconds
        else:
            step = StepTime(started, ended, migrated)
            self._alone += 1
            self._alone_seconds += step.seconds
        self._recent.append(step)

    def take_sum(self) -> StepSum:
        """What a snapshot reports; the next sum begins at zero."""
        total = StepSum(
            steps=self._steps,
            continued=self._continued,
            continued_seconds=self._continued_seconds,
            alone=self._alone,
            alone_seconds=self._alone_seconds,
        )
        self._reset()
        return total

    def take_recent(self) -> list[StepTime]:
        """The busy steps since the last call, oldest first."""
        taken = list(self._recent)
        self._recent.clear()
        return taken

    def _reset(self) -> None:
        self._steps = self._continued = self._alone = 0
        self._continued_seconds = self._alone_seconds = 0.0
