"""Gain: what a replay saves against another one of the same trace, and whether that is more than noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.offline.run import Replayed

_BLOCKS = 10
"""Parts of a trace that are taken to be independent: neighbouring snapshots are alike."""

_LEAST = 0.0005
"""Less is shown as 0.0 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a replay saves against a baseline.

    saved: fraction of the step time; below 0 if steps are longer.
    error: its standard error, by how it varies over the trace; None if the trace has too few snapshots.
    """

    saved: float
    error: float | None

    @classmethod
    def of(cls, one: Replayed, baseline: Replayed) -> Gain:
        """The gain of a replay. Both are of the same trace.

        The error is that of a ratio of sums over blocks (W. G. Cochran, Sampling Techniques, section 6.4).
        """
        saved = 1.0 - one.mean_step_seconds / baseline.mean_step_seconds
        if len(one.seconds_N) < _BLOCKS:
            return cls(saved=saved, error=None)
        baseline_B = _seconds_B(baseline)
        residual_B = _seconds_B(one) - (1.0 - saved) * baseline_B
        variance = float(residual_B @ residual_B) * _BLOCKS / (_BLOCKS - 1)
        return cls(saved=saved, error=variance**0.5 / float(baseline_B.sum()))

    @property
    def sure(self) -> bool:
        """Whether steps are shorter by more than two standard errors."""
        return self.error is not None and self.saved >= max(2.0 * self.error, _LEAST)

    @property
    def loss(self) -> bool:
        """Whether steps are longer by more than two standard errors."""
        return self.error is not None and -self.saved >= max(2.0 * self.error, _LEAST)


def _seconds_B(one: Replayed) -> NDArray[np.float64]:
    """float64 [blocks]. The predicted time of each block of snapshots."""
    blocks = np.array_split(one.seconds_N * one.steps_N, _BLOCKS)
    return np.array([block.sum() for block in blocks])
