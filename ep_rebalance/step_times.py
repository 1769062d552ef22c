"""Engine steps of one rank: how many, how long, and which of them moved experts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

STEPS_KEPT = 65_536


@dataclass(frozen=True, slots=True)
class StepTime:
    """One engine step of this rank: when, and whether it also moved experts.

    began, ended: seconds of `time.perf_counter`, on Linux the same clock in all processes.
    """

    began: float
    ended: float
    migrated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSum:
    """Steps since the snapshot before; busy are those in which this rank had tokens."""

    steps: int = 0
    busy_steps: int = 0
    busy_seconds: float = 0.0


class StepTimes:
    """Sums for the next snapshot, and the newest STEPS_KEPT busy steps one by one."""

    def __init__(self) -> None:
        self._recent: deque[StepTime] = deque(maxlen=STEPS_KEPT)
        self._steps, self._busy_steps, self._busy_seconds = 0, 0, 0.0

    def begin(self) -> None:
        """A step has been computed; its time is not known yet."""
        self._steps += 1

    def end(self, step: StepTime) -> None:
        """The time of a step in which this rank had tokens."""
        self._busy_steps += 1
        self._busy_seconds += step.ended - step.began
        self._recent.append(step)

    def take_sum(self) -> StepSum:
        """What a snapshot reports; the next sum begins at zero."""
        total = StepSum(
            steps=self._steps, busy_steps=self._busy_steps, busy_seconds=self._busy_seconds
        )
        self._steps, self._busy_steps, self._busy_seconds = 0, 0, 0.0
        return total

    def take_recent(self) -> list[StepTime]:
        """The busy steps since the last call, oldest first."""
        taken = list(self._recent)
        self._recent.clear()
        return taken
