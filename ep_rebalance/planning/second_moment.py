"""Second moment of the expert loads: what the incremental planner minimises over.

With `l` the load of a rank in a snapshot, the mean of `l^2` over snapshots charges a rank both for
its mean load and for experts that are busy at the same time. As `l` is a sum over experts, that
mean needs only E x E numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def second_moment_EE(samples_WE: NDArray[np.float64], num_ranks: int) -> NDArray[np.float64]:
    """float64 [E, E], second moment of one layer's expert loads, in units of the mean rank load.

    Every snapshot is scaled to a mean rank load of 1 and weighs as many tokens as it holds. What
    noise alone explains is taken out, as James and Stein and Ledoit and Wolf do: the spread of the
    means over experts, the variances over snapshots and the covariances are each shrunk by the part
    of them that noise is expected to make. Few or uncertain snapshots therefore look even, and an
    even load leaves nothing to gain. Raises ValueError if there are no tokens.
    """
    tokens_W = samples_WE.sum(axis=1)
    samples_WE, tokens_W = samples_WE[tokens_W > 0], tokens_W[tokens_W > 0]
    if not tokens_W.size:
        raise ValueError("a layer without tokens has no second moment")
    total = tokens_W.sum()
    load_WE = samples_WE * (num_ranks / tokens_W)[:, None]
    mean_E = tokens_W @ load_WE / total
    spread_WE = (load_WE - mean_E) * np.sqrt(tokens_W / total)[:, None]
    counting = num_ranks**2 / total
    variance = float(np.sum(spread_WE**2))
    mean_E = _shrunk_mean(mean_E, max(counting, variance / max(tokens_W.size - 1, 1)))
    moment_EE = _shrunk_covariance(spread_WE, counting)
    moment_EE += np.outer(mean_E, mean_E)
    return moment_EE


def _shrunk_mean(mean_E: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """The means drawn towards an even load; `noise` is their summed variance."""
    even = mean_E.mean()
    kept = _signal_part(float(np.sum((mean_E - even) ** 2)), noise, mean_E.size)
    shrunk_E: NDArray[np.float64] = even + kept * (mean_E - even)
    return shrunk_E


def _shrunk_covariance(spread_WE: NDArray[np.float64], counting: float) -> NDArray[np.float64]:
    """`counting`: summed variance that counting alone gives a snapshot, times its weight."""
    covariance_EE = spread_WE.T @ spread_WE
    variance_E = covariance_EE.diagonal().copy()
    snapshots = spread_WE.shape[0]
    pairs = float(np.vdot(covariance_EE, covariance_EE) - variance_E @ variance_E)
    squares_W = np.sum(spread_WE**2, axis=1)
    products = float(np.sum(squares_W**2) - np.sum(spread_WE**4))
    covariance_EE *= _signal_part(pairs, products - pairs / snapshots, variance_E.size)
    kept = _signal_part(float(variance_E.sum()), counting * (snapshots - 1), variance_E.size)
    np.fill_diagonal(covariance_EE, kept * variance_E)
    return covariance_EE


def _signal_part(observed: float, noise: float, experts: int) -> float:
    """Part of a sum of squares over experts that `noise`, its expectation, does not explain.

    Noise is taken two standard deviations (of a chi-square) above its expectation, or every second
    layer of an even load would seem to have a signal.
    """
    likely = noise * (1.0 + 2.0 * np.sqrt(2.0 / experts))
    return float(max(0.0, 1.0 - likely / observed)) if observed > 0 else 0.0
