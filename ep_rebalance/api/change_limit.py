"""Change limit: how many of an operator's changes reach the engine in a time.

Each change makes all workers answer between two steps, so that a storm of them would slow the steps. Single
changes pass at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

CHANGES_AT_ONCE = 4
SECONDS_PER_CHANGE = 1.0
"""After a burst, one change in this time."""


class TooManyChanges(Exception):
    """A change came too soon after others.

    wait_seconds: until one may pass.
    will_follow: whether the newest such change is carried out then, without being asked for again.
    retry_seconds: until another may pass, which then is the one after.
    """

    def __init__(self, wait_seconds: float, *, will_follow: bool) -> None:
        super().__init__(f"too many changes; one may pass in {wait_seconds:.1f} s")
        self.wait_seconds = wait_seconds
        self.will_follow = will_follow
        self.retry_seconds = wait_seconds + (SECONDS_PER_CHANGE if will_follow else 0.0)


class ChangeLimit:
    """A bucket of CHANGES_AT_ONCE changes, into which one flows every SECONDS_PER_CHANGE.

    clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._seen = float(CHANGES_AT_ONCE), clock()

    def take(self) -> float:
        """Take a change out of the bucket. Returns 0, or for how many seconds there is none to take."""
        now = self._clock()
        filled = self._left + (now - self._seen) / SECONDS_PER_CHANGE
        self._left, self._seen = min(filled, float(CHANGES_AT_ONCE)), now
        if self._left < 1.0:
            return (1.0 - self._left) * SECONDS_PER_CHANGE
        self._left -= 1.0
        return 0.0
