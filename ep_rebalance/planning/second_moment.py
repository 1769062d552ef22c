"""Second moment of the expert loads: what the incremental planner minimises over.

With `l` the load of a rank in a snapshot, the mean of `l^2` over snapshots charges a rank both for its mean load and
for experts that are busy at the same time. As `l` is a sum over experts, that mean needs only E x E numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def second_moment_EE(samples_WE: NDArray[np.float64], num_ranks: int) -> NDArray[np.float64]:
    """float64 [E, E], second moment of one layer's expert loads, in units of the mean rank load.

    Every snapshot is scaled to a mean rank load of 1 and weighs as many tokens as it holds. What counting
    noise alone explains is taken out: the spread of the means over experts, and the covariance over
    snapshots, are each shrunk by the part of them that noise is expected to make (as James and Stein do).
    Raises ValueError if there are no tokens.
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
    kept = _signal_part(variance, counting * (tokens_W.size - 1))
    moment_EE: NDArray[np.float64] = np.outer(mean_E, mean_E) + kept * (spread_WE.T @ spread_WE)
    return moment_EE


def _shrunk_mean(mean_E: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """The means drawn towards an even load; `noise` is their summed variance."""
    even = mean_E.mean()
    kept = _signal_part(float(np.sum((mean_E - even) ** 2)), noise)
    return even + kept * (mean_E - even)


def _signal_part(observed: float, noise: float) -> float:
    return max(0.0, 1.0 - noise / observed) if observed > 0 else 0.0
