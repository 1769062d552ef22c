"""Track record: what committed plans promised, and what came of it on load they had not seen.

A plan is made from the past, and load that shifts faster than the window makes its promises hollow.
The decision takes every promise for the part of it that earlier ones kept, so that a planner that is
being fooled stops moving experts, and begins again when moving would have paid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load_window import WindowLoad
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
    """Sums over earlier promises, older ones counted less."""

    predicted: float = 0.0
    achieved: float = 0.0

    @property
    def trust(self) -> float:
        """Part of a promise that is believed, 0.1 to 1."""
        kept = (self.achieved + _FULL_TRUST) / (self.predicted + _FULL_TRUST)
        return float(min(max(kept, _LEAST_TRUST), 1.0))

    def with_outcome(self, predicted: float, achieved: float) -> TrackRecord:
        """A loss counts for no more than the gain that was promised, or one bad window would silence
        the planner for long."""
        faded = self.faded()
        return TrackRecord(
            predicted=faded.predicted + predicted,
            achieved=faded.achieved + max(achieved, -predicted),
        )

    def faded(self) -> TrackRecord:
        """After a plan that was not carried out."""
        return TrackRecord(
            predicted=_REMEMBERED * self.predicted, achieved=_REMEMBERED * self.achieved
        )
