"""Measured gain: what a commit did to the server's own step times.

Balance in tokens need not be time: a decode step that reads the same weights takes as long however
its tokens are spread. Steps before and after a commit differ in what they carry, though, and in how
long their contexts are. A snapshot's mean step is therefore taken for

    (a + b * prefill tokens + c * decode tokens + d * moment) * (1 - gain after the commit)

and fitted by Huber's M-estimator (Huber, Robust Statistics, 1981, ch. 7) to all snapshots that carried
alike. `d` takes up what drifts by itself. The error is widened where one snapshot's deviation goes on
into the next.
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
"""On each side of a commit, nearest to it."""
_LEAST_SNAPSHOTS = 5
"""On each side."""
_LEAST_TO_SPARE = 6
"""Snapshots beyond the numbers that are fitted."""
_LIKE = 0.1
"""Part by which tokens per step may lie outside those of the other side."""
_HUBER = 1.345
"""Deviations, in standard ones, from which a snapshot pulls no harder: 95 % efficiency."""
_ROUNDS = 30
"""Most steps of the fit; a handful is usual."""
_CERTAIN = 3.0
"""Standard errors. More than the usual two, since the same commit is looked at after every plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGain:
    """gain: part of the step time that a commit saved, below 0 if it cost some."""

    gain: float
    standard_error: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which it lies with a probability of about 95 %."""
        return self.gain - 2 * self.standard_error, self.gain + 2 * self.standard_error

    def part_kept(self, promised: float) -> float:
        """Of a gain that it is surely below; infinite where that may well have been reached."""
        surely_below = self.gain + _CERTAIN * self.standard_error < promised
        return self.gain / promised if surely_below and promised > 0 else math.inf


class MeanStep(NamedTuple):
    """Of one snapshot. moment: number of the snapshot. prefill, decode: (token, expert) pairs."""

    moment: int
    prefill: float
    decode: float
    seconds: float


class StepHistory:
    """Mean steps on both sides of the newest commit."""

    def __init__(self) -> None:
        self._generation: int | None = None
        self._moment = 0
        self._before: list[MeanStep] = []
        self._after: list[MeanStep] = []

    def add(self, samples: Sequence[LoadSample]) -> None:
        """More snapshots, oldest first. The first one of a generation is left out: the migration's own
        steps are in it."""
        for sample in samples:
            self._moment += 1
            if sample.generation != self._generation:
                self._generation = sample.generation
                self._before, self._after = self._after[-SNAPSHOTS_KEPT:], []
            elif sample.step_seconds > 0:
                prefill, decode = sample.counts_ALE.sum(axis=(1, 2)) / sample.steps
                self._after.append(MeanStep(self._moment, prefill, decode, sample.step_seconds))

    def gain(self) -> MeasuredGain | None:
        """Of the newest commit; None while too few comparable steps were seen."""
        return measured_gain(self._before, self._after[:SNAPSHOTS_KEPT])


def measured_gain(before: Sequence[MeanStep], after: Sequence[MeanStep]) -> MeasuredGain | None:
    """What the steps of `after` saved against those of `before`; None if they do not tell."""
    if not before or not after:
        return None
    before_N4, after_N4 = _alike(np.array(before, dtype=np.float64), np.array(after, np.float64))
    if min(len(before_N4), len(after_N4)) < _LEAST_SNAPSHOTS:
        return None
    steps_N4 = np.concatenate([before_N4, after_N4])
    after_N = np.repeat([0.0, 1.0], [len(before_N4), len(after_N4)])
    return _fitted(_features(steps_N4), after_N, steps_N4[:, 3])


def _alike(
    before_N4: NDArray[np.float64], after_N4: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Those whose tokens lie within the range of the other side's."""
    sides = (before_N4[:, 1:3], after_N4[:, 1:3])
    least_2 = np.max([tokens_N2.min(axis=0) for tokens_N2 in sides], axis=0) * (1 - _LIKE)
    most_2 = np.min([tokens_N2.max(axis=0) for tokens_N2 in sides], axis=0) * (1 + _LIKE)
    alike = [((least_2 <= side) & (side <= most_2)).all(axis=1) for side in sides]
    return before_N4[alike[0]], after_N4[alike[1]]


def _features(steps_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N, F] of order 1, those that vary: a constant, tokens by phase, the moment."""
    varying_N3 = steps_N4[:, [1, 2, 0]] - steps_N4[:, [1, 2, 0]].mean(axis=0)
    largest_3 = np.abs(varying_N3).max(axis=0)
    chosen = largest_3 > 1e-6 * steps_N4[:, [1, 2, 0]].max(axis=0)
    return np.column_stack([np.ones(len(steps_N4)), varying_N3[:, chosen] / largest_3[chosen]])


def _fitted(
    features_NF: NDArray[np.float64], after_N: NDArray[np.float64], seconds_N: NDArray[np.float64]
) -> MeasuredGain | None:
    """after_N: 1 after the commit, 0 before."""
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
    """One Gauss-Newton step in relative deviations, each pulling as hard as it may.

    level_N: seconds of each snapshot's mean step but for the gain.
    """
    of_level_NF = features_NF * ((1.0 - gain * after_N) / level_N)[:, None]
    design_NF = np.column_stack([of_level_NF, -after_N])
    target_N = seconds_N / level_N - gain * after_N
    root_N = np.sqrt(pull_N)
    solution_F, *_ = np.linalg.lstsq(design_NF * root_N[:, None], target_N * root_N, rcond=None)
    level_N = np.maximum(features_NF @ solution_F[:-1], 0.1 * np.median(seconds_N))
    return level_N, float(solution_F[-1])


def _pull(off_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for an ordinary deviation, less for one that is too large to be believed in full."""
    ordinary = _HUBER * max(1.4826 * float(np.median(np.abs(off_N))), 1e-9)
    pull_N: NDArray[np.float64] = ordinary / np.maximum(np.abs(off_N), ordinary)
    return pull_N


def _told_by_commit(features_NF: NDArray[np.float64], after_N: NDArray[np.float64]) -> float | None:
    """Snapshots' worth of what only the commit explains; None if tokens or time explain it as well."""
    explained_F, *_ = np.linalg.lstsq(features_NF, after_N, rcond=None)
    rest_N = after_N - features_NF @ explained_F
    told = float(rest_N @ rest_N)
    return told if told > 0.01 * after_N.sum() else None


def _widening(off_N: NDArray[np.float64]) -> float:
    """Of the variance, where one deviation goes on into the next."""
    total = float(off_N @ off_N)
    follows = float(off_N[1:] @ off_N[:-1]) / total if total else 0.0
    follows = min(max(follows, 0.0), 0.9)
    return (1.0 + follows) / (1.0 - follows)
