"""Track record: what committed plans promised, and what became of it on load they had not seen.

A plan is made from the past, and if load shifts faster than the window, its promise is hollow. The
decision therefore believes a promise only as far as earlier ones were kept: a planner that is being
fooled stops moving experts, and starts again once moving would have paid. A promise is judged twice:
by the cost of later load, which is known soon, and by the server's step times, which show whether
that cost is time at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import CostModel, mean_imbalance_L
from ep_rebalance.planning.step_work import StepWork

_FULL_TRUST = 0.02
"""A gain that is believed in advance, as if an earlier plan had promised and kept it."""
_REMEMBERED = 0.7
"""What earlier outcomes still count when another is added, or when a plan is not carried out."""
_LEAST_TRUST = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Promise:
    """A committed plan, and the placement that it replaced, both with quotas fitted to one window.

    before_quotas_LP, after_quotas_LP: float64 [L, P]. As in `Plan`.
    predicted: the fraction of the busiest ranks' cost, summed over layers, that it was to save.
    work: of the mean step that this is a saving of; None if unknown.
    """

    before: Placement
    before_quotas_LP: NDArray[np.float64]
    after: Placement
    after_quotas_LP: NDArray[np.float64]
    predicted: float
    work: StepWork | None = None

    def achieved(self, load: WindowLoad, cost: CostModel) -> float:
        """The fraction that it saved on `load`, which came after the commit; below 0 if the cost rose."""
        before_L = mean_imbalance_L(cost, load, self.before, self.before_quotas_LP)
        after_L = mean_imbalance_L(cost, load, self.after, self.after_quotas_LP)
        return float(1.0 - after_L.sum() / before_L.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackRecord:
    """Sums over earlier promises, in which older ones count less.

    The newest promise is kept apart, because step times may yet show that it was hollow.

    predicted: what all promises but the newest were to save.
    achieved: what they saved.
    newest_predicted: what the newest promise was to save.
    newest_achieved: what it saved, by the cost of later load.
    newest_part: the fraction of it that was kept at most, by step times; infinite if they do not tell.
    """

    predicted: float = 0.0
    achieved: float = 0.0
    newest_predicted: float = 0.0
    newest_achieved: float = 0.0
    newest_part: float = math.inf

    @property
    def trust(self) -> float:
        """The fraction of a promise that is believed, 0.1 to 1: achieved / predicted, where both begin at
        `_FULL_TRUST`.
        """
        predicted, achieved = self.predicted + self.newest_predicted, self.achieved + self._newest
        kept = (achieved + _FULL_TRUST) / (predicted + _FULL_TRUST)
        return float(min(max(kept, _LEAST_TRUST), 1.0))

    def with_outcome(self, predicted: float, achieved: float) -> TrackRecord:
        """The record with one more promise, judged by the cost of later load.

        A loss counts no more than the gain that was promised; otherwise one bad window would silence
        the planner for a long time. What is not finite says nothing, as a plan that was not carried out.
        """
        faded = self.faded()
        if not (math.isfinite(predicted) and math.isfinite(achieved)):
            return faded
        return TrackRecord(
            predicted=faded.predicted + faded.newest_predicted,
            achieved=faded.achieved + faded._newest,
            newest_predicted=predicted,
            newest_achieved=max(achieved, -predicted),
        )

    def with_measured(self, part: float) -> TrackRecord:
        """The record once step times show that at most `part` of the newest promise was kept; infinite if
        they do not tell. What is not a number changes nothing.
        """
        if math.isnan(part):
            return self
        return replace(self, newest_part=max(part, -1.0))

    def faded(self) -> TrackRecord:
        """The record after a plan that was not carried out: everything in it counts less."""
        return TrackRecord(
            predicted=_REMEMBERED * self.predicted,
            achieved=_REMEMBERED * self.achieved,
            newest_predicted=_REMEMBERED * self.newest_predicted,
            newest_achieved=_REMEMBERED * self.newest_achieved,
            newest_part=self.newest_part,
        )

    @property
    def _newest(self) -> float:
        """What the newest promise achieved, by the stricter of its two judges."""
        if math.isinf(self.newest_part):
            return self.newest_achieved
        return min(self.newest_achieved, self.newest_part * self.newest_predicted)
