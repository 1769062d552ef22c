"""Step model: how long steps take, by what their mean and their busiest ranks compute.

The mean step of a snapshot is modelled as

    seconds = a + sum over phases of (b * mean cost + c * (busiest - mean cost)) + d * age * seconds

with the age of the snapshot, and the cost of a rank summed over layers, in the unit of the planner's
cost model (with `planner.objective: time` that has the activated experts in it).

**What is identified.** `c`, by steps whose busiest rank differs while their mean rank does not: load that
shifts between experts, and commits. It holds all that goes with the busiest rank's tokens: its experts,
and the all-to-all to it. Attention and other layers go with all tokens of a step, and so into `b`. What
is the same for any number of tokens, such as reading weights that are read anyway, goes into `a`; a
placement does not change it. `d` absorbs what makes all of a step drift, so that the other numbers are
those of now.

**What is not identified.** The busiest rank's experts where the imbalance stays as it is, or follows the
mean: `b` has them then. Nor what comes and goes with the imbalance for other reasons, such as contexts
that are longer in one language: it counts as the experts'.

The number of activated experts is no feature of its own where tokens are balanced: planners do not know
it there, so no promise is made in it. Where steps take as long as activated experts are read, `c` comes
out as about nothing, as it should. The model is a straight line: a busiest rank that stops waiting for
arithmetic once it has fewer tokens saves less than `c` says, until steps with fewer have been seen.

**How.** Bayesian linear regression: a normal prior and normal deviations make a normal posterior (Gelman
et al., Bayesian Data Analysis, 3rd ed., ch. 14). The prior says that 0.5 of a step waits for the busiest
ranks, with a standard error of 0.25, in each phase, and next to nothing of `a`, `b` and `d`. So it is
0.5 while steps tell nothing, and as they tell more it moves, and its error falls, without a switch.
Deviations are relative to the modelled time. Huber's weights (Robust Statistics, 1981, ch. 7) bound what
an outlier pulls. Older snapshots count less, since load and contexts change. Where successive deviations
are correlated, n snapshots count as n (1 - r q) / (1 + r q), where r and q are the lag-one correlations
of the deviations and of the busiest ranks' excess (Bartlett 1935).

Letters of this module: `N` snapshots, `F` features (1, the age, mean and excess by phase); others as in
`placement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.planning.step_work import StepWork

ASSUMED_FRACTION = 0.5
"""What is taken to wait for the busiest ranks while step times do not tell."""
ASSUMED_ERROR = 0.25
"""Standard error of that: two of them reach 0 and 1."""
HALF_LIFE_SNAPSHOTS = 128.0
"""A snapshot of this age counts half."""

_AGE = 1
"""Which feature is the age of a snapshot."""
_PHASES_ALIKE = 0.5
"""Correlation of the phases' slopes in the prior: they run on the same machine."""
_UNKNOWN = 10.0
"""Standard error of what the prior knows nothing of, in units in which it is about 1."""
_HUBER = 1.345
"""Standard deviations beyond which a snapshot pulls no harder: 95 % efficiency on normal errors."""
_OUTLYING = 5.0
"""Beyond so many times what it should take at most, a step says nothing of what others take."""
_ROUNDS = 50
"""The most iterations of the fit; ten are usual."""
_LEAST_DEVIATION = 1e-4
"""Of a mean step, relative to the modelled one: clocks and the model are no better."""


class Waiting(NamedTuple):
    """The fraction of a step that waits for the busiest ranks, as it was found.

    fraction, standard_error: may lie outside of 0 to 1, and need not be finite.
    told: the part of what is known that comes from step times: 0 to 1.
    """

    fraction: float
    standard_error: float
    told: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepModel:
    """What steps told of the busiest ranks' cost.

    slopes_A: float64 [A], seconds for each unit of a busiest rank's cost, by phase.
    covariance_AA: float64 [A, A]. Of `slopes_A`.
    prior_covariance_AA: float64 [A, A]. The same before any step was seen.
    phases_A: bool [A], which phases plans are made for.
    """

    slopes_A: NDArray[np.float64]
    covariance_AA: NDArray[np.float64]
    prior_covariance_AA: NDArray[np.float64]
    phases_A: NDArray[np.bool_]

    def waiting(self, work: StepWork) -> Waiting:
        """What waits of a step like `work`."""
        # fraction = sum of c busiest / seconds, so its gradient by c is busiest / seconds.
        gradient_A = np.where(self.phases_A, work.busiest_A, 0.0) / work.seconds
        variance = float(gradient_A @ self.covariance_AA @ gradient_A)
        prior_variance = float(gradient_A @ self.prior_covariance_AA @ gradient_A)
        return Waiting(
            fraction=float(gradient_A @ self.slopes_A),
            standard_error=float(np.sqrt(max(variance, 0.0))),
            told=1.0 - variance / prior_variance if prior_variance > 0.0 else 0.0,
        )


def fitted(
    works: Sequence[StepWork],
    moment_N: NDArray[np.float64],
    phases_A: NDArray[np.bool_],
    half_life: float = HALF_LIFE_SNAPSHOTS,
) -> StepModel:
    """A model of the works, oldest first.

    moment_N: float64 [N], ascending. Numbers of the snapshots.
    phases_A: bool [A], which phases plans are made for.
    half_life: snapshots.
    """
    seconds_N = np.array([work.seconds for work in works])
    busiest_NA = np.array([work.busiest_A for work in works])
    mean_NA = np.array([work.mean_A for work in works])
    usual = float(np.median(seconds_N))
    seconds_A = _seconds_per_cost(_plausible(seconds_N, busiest_NA), busiest_NA)
    # In these units a slope is the fraction of a step of that phase, and all other numbers are about 1.
    per_second_A = seconds_A / usual
    age_N = moment_N[-1] - moment_N
    features_NF = np.column_stack(
        [
            np.ones(len(works)),
            age_N / max(age_N[0], 1.0),
            mean_NA * per_second_A,
            (busiest_NA - mean_NA) * per_second_A,
        ]
    )
    prior = _Prior.of(len(phases_A))
    direction_A = np.where(phases_A, busiest_NA.mean(axis=0) * per_second_A, 0.0)
    solution_F, covariance_FF = _posterior(
        features_NF, seconds_N / usual, 0.5 ** (age_N / half_life), prior, direction_A
    )
    slopes = slice(-len(phases_A), None)
    units_AA = np.outer(seconds_A, seconds_A)
    return StepModel(
        slopes_A=solution_F[slopes] * seconds_A,
        covariance_AA=covariance_FF[slopes, slopes] * units_AA,
        prior_covariance_AA=np.linalg.inv(prior.precision_FF[slopes, slopes]) * units_AA,
        phases_A=phases_A,
    )


def _plausible(
    seconds_N: NDArray[np.float64], busiest_NA: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [N], the times, with those that only a pause explains cut to what is the longest otherwise."""
    # A step takes about as long as the median one, or in proportion to its cost, whichever is longer. One
    # pause of a minute would otherwise scale the prior, and so what is assumed.
    cost_N = busiest_NA.sum(axis=1)
    expected_N = np.maximum(np.median(seconds_N), np.median(seconds_N / cost_N) * cost_N)
    plausible_N: NDArray[np.float64] = np.minimum(seconds_N, _OUTLYING * expected_N)
    return plausible_N


def _seconds_per_cost(
    seconds_N: NDArray[np.float64], busiest_NA: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [A], seconds of a step for each unit of a busiest rank's cost, in the steps of a phase."""
    # Each snapshot counts by the phase's part of its cost: sum(part seconds) / sum(part busiest).
    total_N = busiest_NA.sum(axis=1)
    part_NA = busiest_NA / total_N[:, None]
    seconds_A, cost_A = part_NA.T @ seconds_N, part_NA.T @ total_N
    return np.where(
        cost_A > 0.0, seconds_A / np.maximum(cost_A, 1e-300), seconds_N.sum() / total_N.sum()
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Prior:
    """What is taken of the features' factors before any step was seen; slopes of the excess come last.

    mean_F: float64 [F].
    precision_FF: float64 [F, F].
    """

    mean_F: NDArray[np.float64]
    precision_FF: NDArray[np.float64]

    @classmethod
    def of(cls, phases: int) -> _Prior:
        others = 2 + phases
        alike_AA = _PHASES_ALIKE + (1.0 - _PHASES_ALIKE) * np.eye(phases)
        precision_FF = np.zeros((others + phases, others + phases))
        precision_FF[:others, :others] = np.eye(others) / _UNKNOWN**2
        precision_FF[others:, others:] = np.linalg.inv(ASSUMED_ERROR**2 * alike_AA)
        mean_F = np.append(np.zeros(others), np.full(phases, ASSUMED_FRACTION))
        return cls(mean_F, precision_FF)


def _posterior(
    features_NF: NDArray[np.float64],
    seconds_N: NDArray[np.float64],
    weight_N: NDArray[np.float64],
    prior: _Prior,
    direction_A: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(factors [F] of the features, their covariance [F, F]).

    weight_N: float64 [N], 0 to 1. How much a snapshot counts by its age.
    direction_A: float64 [A]. How much each phase's slope counts in what is asked.
    """
    level_N = np.full(len(seconds_N), np.median(seconds_N))
    pull_N, variance = np.ones(len(seconds_N)), 1e-2
    excess_N = _unexplained(features_NF, len(direction_A), direction_A, weight_N)
    solution_F = prior.mean_F
    for _ in range(_ROUNDS):
        before_F = solution_F
        relative_NF, relative_N = features_NF / level_N[:, None], seconds_N / level_N
        relative_NF[:, _AGE] = features_NF[:, _AGE]  # of which `d` is a part of the modelled time
        weighted_NF = relative_NF * (weight_N * pull_N / variance)[:, None]
        told_FF = weighted_NF.T @ relative_NF
        covariance_FF = np.linalg.inv(told_FF + prior.precision_FF)
        solution_F = covariance_FF @ (
            weighted_NF.T @ relative_N + prior.precision_FF @ prior.mean_F
        )
        off_N = relative_N - relative_NF @ solution_F
        pull_N = _pull(off_N)
        clipped_N = pull_N * off_N
        # Huber's variance of an estimate: sum(psi^2) / (n - numbers fitted) / mean(psi')^2.
        to_spare = max(weight_N.sum() - float(np.trace(covariance_FF @ told_FF)), 1.0)
        kept = float(np.average(pull_N == 1.0, weights=weight_N))
        spread = float(weight_N @ clipped_N**2) / to_spare / kept**2
        variance = max(spread, _LEAST_DEVIATION**2) * _widening(clipped_N, excess_N)
        level_N = np.maximum(level_N * (relative_NF @ solution_F), 0.1 * np.median(seconds_N))
        if np.abs(solution_F - before_F).max() < 1e-9:
            break
    return solution_F, np.asarray(covariance_FF, dtype=np.float64)


def _unexplained(
    features_NF: NDArray[np.float64],
    phases: int,
    direction_A: NDArray[np.float64],
    weight_N: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [N], the excess along `direction_A` as far as no other feature explains it."""
    others_NF, excess_N = features_NF[:, :-phases], features_NF[:, -phases:] @ direction_A
    root_N = np.sqrt(weight_N)
    explained_F, *_ = np.linalg.lstsq(others_NF * root_N[:, None], excess_N * root_N, rcond=None)
    rest_N: NDArray[np.float64] = excess_N - others_NF @ explained_F
    return rest_N


def _pull(off_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N], 1 for an ordinary deviation, and less the further one lies beyond it."""
    # min(1, k / |off|), with the standard deviation estimated as 1.4826 times the median of |off|.
    ordinary = _HUBER * max(1.4826 * float(np.median(np.abs(off_N))), _LEAST_DEVIATION)
    pull_N: NDArray[np.float64] = ordinary / np.maximum(np.abs(off_N), ordinary)
    return pull_N


def _widening(off_N: NDArray[np.float64], excess_N: NDArray[np.float64]) -> float:
    """Factor of the variance where successive deviations are correlated, and so is the excess."""
    both = min(max(_follows(off_N), 0.0) * max(_follows(excess_N), 0.0), 0.95)
    return (1.0 + both) / (1.0 - both)


def _follows(values_N: NDArray[np.float64]) -> float:
    """Lag-one correlation of what is 0 on average."""
    total, count = float(values_N @ values_N), len(values_N)
    correlation = float(values_N[1:] @ values_N[:-1]) / total if total > 0.0 else 0.0
    # Short series show too little of it (Kendall 1954): (1 + 3 r) / n is missing.
    return correlation + (1.0 + 3.0 * correlation) / count
