"""Expert time: the fraction of a step that waits for the busiest ranks' experts.

A plan saves a fraction of the busiest ranks' cost. What that is of the step depends on model, machine and
load. It is set, or learned from the server's own steps (`step_model.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.planning.cost_model import CostModel
from ep_rebalance.planning.step_model import (
    ASSUMED_ERROR,
    ASSUMED_FRACTION,
    HALF_LIFE_SNAPSHOTS,
    StepModel,
    Waiting,
    fitted,
)
from ep_rebalance.planning.step_work import StepWork, mean_work, step_work

SNAPSHOTS_KEPT = 512
LEAST_SNAPSHOTS = 16

_IMPOSSIBLE = 3.0
"""Standard errors outside of 0 to 1 at which step times cannot mean what the model says."""
_LEARNED = 0.5
"""Part of what is known that must come from step times for the fraction to be called learned."""

Source = Literal["set", "assumed", "learned"]
Setting = float | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTime:
    """The fraction of the step that waits for the busiest ranks' experts, at some load.

    fraction: 0 to 1.
    standard_error: of `fraction`; 0 if it was set.
    source: `set` by `decision.expert_time_fraction`; `learned` if at least half of what is known comes
        from step times; else `assumed`.
    reason: why it is assumed; "" otherwise.
    """

    fraction: float
    standard_error: float = 0.0
    source: Source = "set"
    reason: str = ""

    @property
    def text(self) -> str:
        """Percent, and how they are known."""
        if self.source == "set":
            return f"{self.fraction:.0%} (set)"
        return f"{self.fraction:.0%} (standard error {self.standard_error:.0%}, {self.source})"

    @property
    def least(self) -> float:
        """One standard error below, but not below 0."""
        return max(self.fraction - self.standard_error, 0.0)

    @property
    def bounds(self) -> tuple[float, float]:
        """It lies between these with a probability of about 95 %."""
        return (
            max(self.fraction - 2 * self.standard_error, 0.0),
            min(self.fraction + 2 * self.standard_error, 1.0),
        )


_NOTHING_SEEN = "too few snapshots yet, or no model fits them"
_TELL_LITTLE = (
    "step times do not tell yet: the busiest rank's load varies too little, or they too much"
)


class StepRecord:
    """The newest snapshots' work, from which a `StepModel` is fitted.

    phases: those that plans are made for.
    by_own_counts: see `step_work`.
    snapshots: how many are kept; all of them if None.
    half_life: snapshots. One of this age counts half.

    latest: the mean step of the snapshots that were added last; None before the first.
    """

    def __init__(
        self,
        *,
        cost: CostModel,
        phases: Sequence[str] = PHASES,
        by_own_counts: bool,
        snapshots: int | None = SNAPSHOTS_KEPT,
        half_life: float = HALF_LIFE_SNAPSHOTS,
    ) -> None:
        self.latest: StepWork | None = None
        self._half_life = half_life
        self._cost = cost
        self._phases_A = np.array([phase in phases for phase in PHASES])
        self._by_own_counts = by_own_counts
        self._generation: int | None = None
        self._moment = 0
        self._works: deque[tuple[int, StepWork]] = deque(maxlen=snapshots)

    def add(self, samples: Sequence[LoadSample]) -> None:
        """Add snapshots, oldest first. The first one of each generation is left out, because it
        includes steps of the migration itself.
        """
        added = []
        for sample in samples:
            self._moment += 1
            if sample.generation != self._generation:
                self._generation = sample.generation
                continue
            work = step_work(sample, self._cost, by_own_counts=self._by_own_counts)
            if work is not None:
                added.append(work)
                self._works.append((self._moment, work))
        if added:
            self.latest = mean_work(added)

    def model(self) -> StepModel | None:
        """What they tell; None while there are fewer than LEAST_SNAPSHOTS, and if they differ by so many
        orders of magnitude that they fit no model.
        """
        if len(self._works) < LEAST_SNAPSHOTS:
            return None
        moments, works = zip(*self._works, strict=True)
        try:
            return fitted(works, np.array(moments, np.float64), self._phases_A, self._half_life)
        except np.linalg.LinAlgError:
            # Raised, it would end every plan for as long as these snapshots are kept.
            return None

    def mean(self) -> StepWork | None:
        """The mean step of all that are kept; None if there are none."""
        return mean_work([work for _, work in self._works]) if self._works else None


class ExpertTimeEstimate:
    """`decision.expert_time_fraction` as it is known: a number that was set, or learned with each plan."""

    def __init__(
        self,
        setting: Setting,
        *,
        cost: CostModel,
        phases: Sequence[str],
        by_own_counts: bool = False,
    ) -> None:
        self._set = None if setting == "auto" else unlearned(setting)
        self._record = StepRecord(cost=cost, phases=phases, by_own_counts=by_own_counts)
        self._model: StepModel | None = None

    @property
    def latest(self) -> StepWork | None:
        """The mean step of the snapshots that were added last."""
        return self._record.latest

    def add(self, samples: Sequence[LoadSample]) -> None:
        """Learn from snapshots, oldest first."""
        if self._set is None:
            self._record.add(samples)
            self._model = self._record.model()

    def at(self, work: StepWork | None) -> ExpertTime:
        """The fraction at the load of `work`."""
        if self._set is not None:
            return self._set
        if work is None or self._model is None:
            return unlearned("auto")
        return as_known(self._model.waiting(work))


def unlearned(setting: Setting) -> ExpertTime:
    """What `decision.expert_time_fraction` says before a step was seen."""
    return assumed(_NOTHING_SEEN) if setting == "auto" else ExpertTime(fraction=setting)


def assumed(reason: str) -> ExpertTime:
    """What is taken while step times do not tell."""
    return ExpertTime(
        fraction=ASSUMED_FRACTION, standard_error=ASSUMED_ERROR, source="assumed", reason=reason
    )


def as_known(waiting: Waiting) -> ExpertTime:
    """What a model found, unless it cannot be."""
    fraction, error, told = waiting
    if not np.isfinite(waiting).all():
        return assumed("the model of the step times is not finite")
    if not -_IMPOSSIBLE * error <= fraction <= 1.0 + _IMPOSSIBLE * error:
        return assumed(f"step times say {fraction:.2f}, which cannot be")
    learned = told >= _LEARNED
    return ExpertTime(
        fraction=min(max(fraction, 0.0), 1.0),
        standard_error=error,
        source="learned" if learned else "assumed",
        reason="" if learned else _TELL_LITTLE,
    )
