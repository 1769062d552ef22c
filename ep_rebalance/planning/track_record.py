"""Track record: what committed plans promised, and what came of it on load they had not seen.

A plan is made from the past, and load that shifts faster than the window makes its promises hollow.
The decision takes every promise for the part of it that earlier ones kept, so that a planner that is
being fooled stops moving experts, and begins again when moving would have paid. A promise has two
judges: the cost of later load, which tells soon, and the server's step times, which tell whether that
cost is time at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import CostModel, mean_imbalance_L

_FULL_TRUST = 0.02
"""Gain that is believed before anything is known: as if one plan had promised and kept it."""
_REMEMBERED = 0.7
"""Weight of what is known when one more outcome is added, or when a plan was not carried out."""
_LEAST_TRUST = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Promise:
    """A committed plan, and the placement that it replaced with the quotas fitted to the same
    window.

    predicted: part of the summed busiest ranks' cost that it was to save.
    """

    before: Placement
    before_quotas_LP: NDArray[np.float64]
    after: Placement
    after_quotas_LP: NDArray[np.float64]
    predicted: float

    def achieved(self, load: WindowLoad, cost: CostModel) -> float:
        """Part that it saved on `load`, which was seen after the commit; below 0 if it cost more."""
        before_L = mean_imbalance_L(cost, load, self.before, self.before_quotas_LP)
        after_L = mean_imbalance_L(cost, load, self.after, self.after_quotas_LP)
        return float(1.0 - after_L.sum() / before_L.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackRecord:
    """Sums over earlier promises, older ones counted less.

    predicted, achieved: but for the newest promise, whose own are kept apart, since step times may still
    tell that it was hollow. newest_part: of it that they say was kept; infinite if they tell nothing.
    """

    predicted: float = 0.0
    achieved: float = 0.0
    newest_predicted: float = 0.0
    newest_achieved: float = 0.0
    newest_part: float = math.inf

    @property
    def trust(self) -> float:
        """Part of a promise that is believed, 0.1 to 1."""
        predicted, achieved = self.predicted + self.newest_predicted, self.achieved + self._newest
        kept = (achieved + _FULL_TRUST) / (predicted + _FULL_TRUST)
        return float(min(max(kept, _LEAST_TRUST), 1.0))

    def with_outcome(self, predicted: float, achieved: float) -> TrackRecord:
        """One more promise, held against the cost of load. A loss counts for no more than the gain that
        was promised, or one bad window would silence the planner for long."""
        faded = self.faded()
        return TrackRecord(
            predicted=faded.predicted + faded.newest_predicted,
            achieved=faded.achieved + faded._newest,
            newest_predicted=predicted,
            newest_achieved=max(achieved, -predicted),
        )

    def with_measured(self, part: float) -> TrackRecord:
        """Step times say that at most `part` of the newest promise was kept."""
        return replace(self, newest_part=max(part, -1.0))

    def faded(self) -> TrackRecord:
        """After a plan that was not carried out."""
        return TrackRecord(
            predicted=_REMEMBERED * self.predicted,
            achieved=_REMEMBERED * self.achieved,
            newest_predicted=_REMEMBERED * self.newest_predicted,
            newest_achieved=_REMEMBERED * self.newest_achieved,
            newest_part=self.newest_part,
        )

    @property
    def _newest(self) -> float:
        """What the newest promise achieved, by the judge who gives less."""
        if math.isinf(self.newest_part):
            return self.newest_achieved
        return min(self.newest_achieved, self.newest_part * self.newest_predicted)
