"""What the demo reads from the status route during one kind of traffic, and makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ep_rebalance.telemetry.metrics import Status

SETTLING_SECONDS = 2.0  # requests of the phase before are still being answered
READINGS_NOW = 5
READINGS_AT_START = 3
READINGS_AT_END = 10


@dataclass(frozen=True, slots=True)
class Level:
    """Imbalance (max/mean rank load, layers summed): as served, and without rebalancing."""

    served: float
    without: float

    @property
    def gain(self) -> float:
        """Part of the busiest rank's load that rebalancing took off it."""
        return 1.0 - self.served / self.without


@dataclass(frozen=True, slots=True)
class Reading:
    """Routed tokens between two polls: of the busiest rank, as served and without rebalancing, and of
    the mean rank.
    """

    served: float
    without: float
    mean: float


@dataclass(slots=True)
class Phase:
    """One kind of traffic and what was seen during it.

    seconds: how long it is to last.
    elapsed: seconds since it began. first, last: the status at its beginning, and the newest.
    """

    name: str
    seconds: float
    first: Status
    last: Status
    elapsed: float = 0.0
    readings: list[Reading] = field(default_factory=list)

    def add(self, status: Status, elapsed: float) -> None:
        """Take in a newly polled status."""
        reading = _between(self.last, status)
        if elapsed >= SETTLING_SECONDS and reading.mean > 0:
            self.readings.append(reading)
        self.last, self.elapsed = status, elapsed

    @property
    def at_start(self) -> Level | None:
        """Over the first readings, at most a quarter of all."""
        return _weighted(self.readings[: _at_most(READINGS_AT_START, len(self.readings) // 4)])

    @property
    def now(self) -> Level | None:
        """Over the newest readings."""
        return _weighted(self.readings[-READINGS_NOW:])

    @property
    def at_end(self) -> Level | None:
        """Over the last readings, at most half of all."""
        return _weighted(self.readings[-_at_most(READINGS_AT_END, len(self.readings) // 2) :])

    @property
    def generations(self) -> int:
        return self.last.generation - self.first.generation

    @property
    def experts_moved(self) -> int:
        return total(self.last.migrated_experts) - total(self.first.migrated_experts)

    @property
    def bytes_moved(self) -> int:
        return total(self.last.migrated_bytes) - total(self.first.migrated_bytes)

    @property
    def tokens_per_second(self) -> float:
        """Prompt and output tokens together."""
        tokens = total(self.last.phase_tokens) - total(self.first.phase_tokens)
        return tokens / self.elapsed if self.elapsed else 0.0


def total(counts: dict[str, int]) -> int:
    """A labelled counter, labels summed."""
    return sum(counts.values())


def _at_most(limit: int, count: int) -> int:
    return max(1, min(limit, count))


def _between(before: Status, after: Status) -> Reading:
    old, new = before.busiest_rank_tokens, after.busiest_rank_tokens
    return Reading(
        served=new["served"] - old["served"],
        without=new["contiguous"] - old["contiguous"],
        mean=fmean(after.rank_tokens) - fmean(before.rank_tokens),
    )


def _weighted(readings: Sequence[Reading]) -> Level | None:
    mean = sum(reading.mean for reading in readings)
    if not mean:
        return None
    return Level(
        sum(reading.served for reading in readings) / mean,
        sum(reading.without for reading in readings) / mean,
    )
