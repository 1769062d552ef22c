"""Measured gain: what a commit did to the server's own step times.

Balance in tokens need not save time: a decode step that reads the same weights takes equally long
however its tokens are spread. But steps before and after a commit also differ in what they carry and
in how long their contexts are. The mean step of a snapshot is therefore modelled as

    seconds = (a + b * prefill tokens + c * decode tokens + d * moment) * (1 - gain * after)

where `after` is 1 for snapshots after the commit and 0 for those before it. The model is fitted by
Huber's M-estimator (Huber, Robust Statistics, 1981, ch. 7) to the snapshots whose tokens are
comparable. `d` absorbs what drifts by itself. The standard error is widened where successive
deviations are correlated.

Letters of this module: `N` snapshots, `F` features (1, tokens by phase, and the moment: what a, b, c and d
are multiplied by); others as in `placement.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import LoadSample

SNAPSHOTS_KEPT = 64
"""On each side of a commit, those nearest to it."""
_LEAST_SNAPSHOTS = 5
"""On each side of a commit; with fewer, nothing is said."""
_LEAST_TO_SPARE = 6
"""How many more snapshots there must be than numbers to fit."""
_LIKE = 0.1
"""How far tokens per step may lie outside the range of the other side, as a fraction of its bounds."""
_HUBER = 1.345
"""Standard deviations beyond which a snapshot pulls no harder: 95 % efficiency on normal errors."""
_ROUNDS = 30
"""The most iterations of the fit; a handful is usual."""
_CERTAIN = 3.0
"""Standard errors. More than the usual two, because a commit is judged again after every plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGain:
    """What a commit saved.

    gain: fraction of the step time; below 0 if steps have taken longer since.
    standard_error: of `gain`.
    """

    gain: float
    standard_error: float

    @property
    def bounds(self) -> tuple[float, float]:
        """The gain lies between these with a probability of about 95 %."""
        return self.gain - 2 * self.standard_error, self.gain + 2 * self.standard_error

    def part_kept(self, promised: float) -> float:
        """The fraction of `promised` that was kept; infinite if all of it may well have been."""
        surely_below = self.gain + _CERTAIN * self.standard_error < promised
        return self.gain / promised if surely_below and promised > 0 else math.inf


class MeanStep(NamedTuple):
    """The mean step of one snapshot.

    moment: number of the snapshot.
    prefill: (token, expert) pairs in a step, over all layers.
    decode: the same of tokens in decode.
    seconds: how long a step took.
    """

    moment: int
    prefill: float
    decode: float
    seconds: float


class StepHistory:
    """The mean steps before and after the newest commit."""

    def __init__(self) -> None:
        self._generation: int | None = None
        self._moment = 0
        self._before: list[MeanStep] = []
        self._after: list[MeanStep] = []

    def add(self, samples: Sequence[LoadSample]) -> None:
        """Add snapshots, oldest first. The first one of each generation is left out, because it
        includes steps of the migration itself.
        """
        for sample in samples:
            self._moment += 1
            if sample.generation != self._generation:
                self._generation = sample.generation
                self._before, self._after = self._after[-SNAPSHOTS_KEPT:], []
            elif sample.step_seconds > 0:
                prefill, decode = sample.counts_ALE.sum(axis=(1, 2)) / sample.steps
                self._after.append(MeanStep(self._moment, prefill, decode, sample.step_seconds))

    def gain(self) -> MeasuredGain | None:
        """What the newest commit gained; None while there are too few comparable snapshots."""
        return measured_gain(self._before, self._after[:SNAPSHOTS_KEPT])


def measured_gain(before: Sequence[MeanStep], after: Sequence[MeanStep]) -> MeasuredGain | None:
    """What steps save since the commit between `before` and `after`; None if that cannot be told, as by
    numbers that fit no model.
    """
    if not before or not after:
        return None
    before_N4, after_N4 = _alike(np.array(before, dtype=np.float64), np.array(after, np.float64))
    if min(len(before_N4), len(after_N4)) < _LEAST_SNAPSHOTS:
        return None
    steps_N4 = np.concatenate([before_N4, after_N4])
    after_N = np.repeat([0.0, 1.0], [len(before_N4), len(after_N4)])
    try:
        found = _fitted(_features(steps_N4), after_N, steps_N4[:, 3])
    except np.linalg.LinAlgError:
        # Raised, it would end every plan for as long as these snapshots are kept.
        return None
    if found is None or not np.isfinite((found.gain, found.standard_error)).all():
        return None
    return found


def _alike(
    before_N4: NDArray[np.float64], after_N4: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rows of both sides whose tokens lie within the range of the other side."""
    sides = (before_N4[:, 1:3], after_N4[:, 1:3])
    least_2 = np.max([tokens_N2.min(axis=0) for tokens_N2 in sides], axis=0) * (1 - _LIKE)
    most_2 = np.min([tokens_N2.max(axis=0) for tokens_N2 in sides], axis=0) * (1 + _LIKE)
    alike = [((least_2 <= side) & (side <= most_2)).all(axis=1) for side in sides]
    return before_N4[alike[0]], after_N4[alike[1]]


def _features(steps_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N, F], of order 1: a constant and, where they vary, tokens by phase and the moment."""
    varying_N3 = steps_N4[:, [1, 2, 0]] - steps_N4[:, [1, 2, 0]].mean(axis=0)
    largest_3 = np.abs(varying_N3).max(axis=0)
    chosen = largest_3 > 1e-6 * steps_N4[:, [1, 2, 0]].max(axis=0)
    return np.column_stack([np.ones(len(steps_N4)), varying_N3[:, chosen] / largest_3[chosen]])


def _fitted(
    features_NF: NDArray[np.float64], after_N: NDArray[np.float64], seconds_N: NDArray[np.float64]
) -> MeasuredGain | None:
    """after_N: float64 [N]. 1 after the commit, 0 before it."""
    to_spare = len(seconds_N) - features_NF.shape[1] - 1
    told = _told_by_commit(features_NF, after_N)
    if to_spare < _LEAST_TO_SPARE or told is None:
        return None
    level_N = np.full(len(seconds_N), np.median(seconds_N))
    gain, pull_N = 0.0, np.ones(len(seconds_N))
    for _ in range(_ROUNDS):
        previous = gain
        level_N, gain = _improved(features_NF, after_N, seconds_N, level_N, gain, pull_N)
        off_N = seconds_N / level_N - (1.0 - gain * after_N)
        pull_N = _pull(off_N)
        if abs(gain - previous) < 1e-9:
            break
    # Huber's variance of an estimate, with psi the clipped deviation:
    # sum psi(off)^2 / (N - F - 1) / mean(psi')^2 / told, and psi' is 1 where nothing was clipped.
    clipped_N = pull_N * off_N
    variance = float(clipped_N @ clipped_N) / to_spare / float(np.mean(pull_N == 1.0)) ** 2
    return MeasuredGain(
        gain=gain, standard_error=float(np.sqrt(variance * _widening(clipped_N) / told))
    )


def _improved(
    features_NF: NDArray[np.float64],
    after_N: NDArray[np.float64],
    seconds_N: NDArray[np.float64],
    level_N: NDArray[np.float64],
    gain: float,
    pull_N: NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """(level_N, gain) after one Gauss-Newton step in relative deviations, weighted by `pull_N`.

    level_N: float64 [N], seconds. What each snapshot's mean step would take without the gain.
    pull_N: float64 [N], 0 to 1. How hard each snapshot may pull.
    """
    # seconds / level = features.x (1 - gain after) / level, linearised at `gain` and level, is
    # features.x (1 - gain after) / level - (new gain - gain) after. Solved for x and the new gain.
    of_level_NF = features_NF * ((1.0 - gain * after_N) / level_N)[:, None]
    design_NF = np.column_stack([of_level_NF, -after_N])
    target_N = seconds_N / level_N - gain * after_N
    root_N = np.sqrt(pull_N)
    solution_F, *_ = np.linalg.lstsq(design_NF * root_N[:, None], target_N * root_N, rcond=None)
    level_N = np.maximum(features_NF @ solution_F[:-1], 0.1 * np.median(seconds_N))
    return level_N, float(solution_F[-1])


def _pull(off_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N], 1 for an ordinary deviation, and less the further one lies beyond it."""
    # min(1, k / |off|), with the standard deviation estimated as 1.4826 times the median of |off|.
    ordinary = _HUBER * max(1.4826 * float(np.median(np.abs(off_N))), 1e-9)
    pull_N: NDArray[np.float64] = ordinary / np.maximum(np.abs(off_N), ordinary)
    return pull_N


def _told_by_commit(features_NF: NDArray[np.float64], after_N: NDArray[np.float64]) -> float | None:
    """How many snapshots' worth of information only the commit explains; None if tokens or time
    explain nearly all of it too.
    """
    # |after - its projection on the features|^2, which divides the variance of the fitted gain.
    explained_F, *_ = np.linalg.lstsq(features_NF, after_N, rcond=None)
    rest_N = after_N - features_NF @ explained_F
    told = float(rest_N @ rest_N)
    return told if told > 0.01 * after_N.sum() else None


def _widening(off_N: NDArray[np.float64]) -> float:
    """Factor of the variance where successive deviations are correlated.

    (1 + r) / (1 - r) for a first-order autoregression whose lag-one correlation is r.
    """
    total = float(off_N @ off_N)
    follows = float(off_N[1:] @ off_N[:-1]) / total if total else 0.0
    follows = min(max(follows, 0.0), 0.9)
    return (1.0 + follows) / (1.0 - follows)
