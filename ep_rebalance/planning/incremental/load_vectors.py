"""Load vectors: what the window says about the experts of one layer, for the incremental planner.

With `l` the load of a rank in a sample, the mean of `l^2` over the samples charges a rank both for
its mean load and for experts that are busy at the same time. An expert with load x_w in sample `w`,
which has the share p_w of all load, and mean m = sum_w p_w x_w is the vector

    (m, sqrt(p_1) (x_1 - m), ..., sqrt(p_W) (x_W - m))

so that the inner product of two experts is the mean of the products of their loads. A rank is the sum
of its experts' vectors, and the mean of `l^2` is the squared length of that: no E x E matrix is
needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled


@compiled
def load_vectors(
    cost_WE: NDArray[np.float64], weight_W: NDArray[np.float64], num_ranks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(vectors_EV, own_E): the load vectors, and the variance of each expert that is not shared.

    cost_WE: float64 [W, E], tokens. What each expert costs in each sample.
    weight_W: float64 [W]. A sample counts this many times its total.

    vectors_EV is float64 [E, 1 + W], in units of the mean rank load. own_E is float64 [E], in units of
    its square: what an expert's vector leaves out of its variance, because it has nothing to do with other
    experts.

    What noise alone explains is removed, as James and Stein do for means and Ledoit and Wolf for
    covariances: the spread of the means over the experts, the variances over the samples and the
    covariances are each shrunk by the fraction that noise is expected to contribute. Few or uncertain
    samples therefore look even, and an even load leaves nothing to gain. Without any load everything
    is zero.
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
    # Counts are Poisson: the variance of a count is the count. Scaled by ranks / total and summed over
    # the experts it is ranks^2 / total.
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
    """float64 [E], the means, drawn towards an even load."""
    # Variance of m = sum_w p_w x_w: sum_w p_w^2 times that of x_w, which is expected from counting, or
    # is estimated from the spread as sum_w p_w (x_w - m)^2 / (1 - sum_w p_w^2). The larger one counts.
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
    """Scale `spread_WE` in place so that its inner products are the shrunk covariances.

    Returns float64 [E], by how much the shrunk variances exceed its squares.
    """
    samples, experts = spread_WE.shape
    # With s = spread_WE the covariance of a and b is c_ab = sum_w s_wa s_wb. Over all pairs a != b,
    # `pairs` is the sum of c_ab^2, and its noise that of sum_w (s_wa s_wb - c_ab / n)^2, n samples.
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
    # |s s^T|^2 = |s^T s|^2: the W x W products have the same sum of squares as the E x E covariances.
    gram_squares = np.sum(gram_WW**2)
    pairs = gram_squares - np.sum(variance_E**2)
    counted = float(np.sum(part_W > 0.0))
    shared = _signal_part(pairs, products - pairs / counted, experts)
    # Expectation of sum_w p_w (x_w - m)^2 if only counting makes the x_w differ.
    counting = np.sum(part_W * (1.0 - part_W) * counting_W)
    kept = _signal_part(variance_E.sum(), counting, experts)
    spread_WE *= np.sqrt(shared)
    beyond_E: NDArray[np.float64] = max(kept - shared, 0.0) * variance_E
    return beyond_E


@compiled
def _signal_part(observed: float, noise: float, experts: int) -> float:
    """The fraction of a sum of squares over experts that noise does not explain.

    observed: the sum of squares.
    noise: what noise alone is expected to contribute to it.

    Noise is taken at two standard deviations above its expectation; otherwise every second layer
    with an even load would seem to carry a signal.
    """
    # The standard deviation of a chi-square with n degrees of freedom is sqrt(2 / n) of its mean.
    likely = noise * (1.0 + 2.0 * np.sqrt(2.0 / experts))
    return max(0.0, 1.0 - likely / observed) if observed > 0.0 else 0.0
