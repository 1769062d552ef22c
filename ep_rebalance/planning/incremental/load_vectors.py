"""Load vectors: what the window says of one layer's experts, as the incremental planner uses it.

With `l` the load of a rank in a sample, the mean of `l^2` over the samples charges a rank both for
its mean load and for experts that are busy at the same time. An expert is a vector whose inner
product with another is their second moment, and a rank is the sum of its experts' vectors: the mean
of `l^2` is its square, and no E x E matrix is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled


@compiled
def load_vectors(
    cost_WE: NDArray[np.float64], weight_W: NDArray[np.float64], num_ranks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64 [E, 1 + W], the mean load of each expert and its spread over the samples, in units of
    the mean rank load; and float64 [E], the variance of each that has nothing to do with others.

    cost_WE: what each expert costs in each sample; a sample counts `weight_W` times its total.

    What noise alone explains is taken out, as James and Stein and Ledoit and Wolf do: the spread of
    the means over experts, the variances over samples and the covariances are each shrunk by the
    part of them that noise is expected to make. Few or uncertain samples therefore look even, and
    an even load leaves nothing to gain. Without any load all is zero.
    """
    samples, experts = cost_WE.shape
    vectors_EV, own_E = np.zeros((experts, 1 + samples)), np.zeros(experts)
    total_W = cost_WE.sum(axis=1)
    part_W = total_W * weight_W
    if part_W.sum() <= 0.0:
        return vectors_EV, own_E
    part_W /= part_W.sum()
    load_WE = np.zeros((samples, experts))
    counting_W = np.zeros(samples)
    for sample in range(samples):
        if total_W[sample] > 0.0:
            load_WE[sample] = cost_WE[sample] * (num_ranks / total_W[sample])
            counting_W[sample] = num_ranks**2 / total_W[sample]
    mean_E = np.zeros(experts)
    for sample in range(samples):
        mean_E += part_W[sample] * load_WE[sample]
    for sample in range(samples):
        load_WE[sample] = (load_WE[sample] - mean_E) * np.sqrt(part_W[sample])
    vectors_EV[:, 0] = _shrunk_mean(mean_E, load_WE, part_W, counting_W)
    own_E += _shrink_spread(load_WE, part_W, counting_W)
    vectors_EV[:, 1:] = load_WE.T
    return vectors_EV, own_E


@compiled
def _shrunk_mean(
    mean_E: NDArray[np.float64],
    spread_WE: NDArray[np.float64],
    part_W: NDArray[np.float64],
    counting_W: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The means drawn towards an even load."""
    concentration = np.sum(part_W**2)
    counting = np.sum(part_W**2 * counting_W)
    drifting = np.sum(spread_WE**2) * concentration / max(1.0 - concentration, concentration)
    even = mean_E.mean()
    kept = _signal_part(np.sum((mean_E - even) ** 2), max(counting, drifting), mean_E.size)
    shrunk_E: NDArray[np.float64] = even + kept * (mean_E - even)
    return shrunk_E


@compiled
def _shrink_spread(
    spread_WE: NDArray[np.float64],
    part_W: NDArray[np.float64],
    counting_W: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Scales `spread_WE` so that its products are the shrunk covariances; returns what the shrunk
    variances have beyond its squares."""
    samples, experts = spread_WE.shape
    variance_E = np.zeros(experts)
    products, gram_WW = 0.0, np.zeros((samples, samples))
    for sample in range(samples):
        squares_E = spread_WE[sample] ** 2
        variance_E += squares_E
        products += squares_E.sum() ** 2 - np.sum(squares_E**2)
    spread_EW = spread_WE.T.copy()
    for expert in range(experts):
        for first in range(samples):
            for second in range(samples):
                gram_WW[first, second] += spread_EW[expert, first] * spread_EW[expert, second]
    gram_squares = np.sum(gram_WW**2)
    pairs = gram_squares - np.sum(variance_E**2)
    counted = float(np.sum(part_W > 0.0))
    shared = _signal_part(pairs, products - pairs / counted, experts)
    counting = np.sum(part_W * (1.0 - part_W) * counting_W)
    kept = _signal_part(variance_E.sum(), counting, experts)
    spread_WE *= np.sqrt(shared)
    beyond_E: NDArray[np.float64] = max(kept - shared, 0.0) * variance_E
    return beyond_E


@compiled
def _signal_part(observed: float, noise: float, experts: int) -> float:
    """Part of a sum of squares over experts that `noise`, its expectation, does not explain.

    Noise is taken two standard deviations (of a chi-square) above its expectation, or every second
    layer of an even load would seem to have a signal.
    """
    likely = noise * (1.0 + 2.0 * np.sqrt(2.0 / experts))
    return max(0.0, 1.0 - likely / observed) if observed > 0.0 else 0.0
