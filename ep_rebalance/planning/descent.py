"""Steepest descent on one layer's sum of squared rank loads, by swaps and exchanges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.planning.compiled import compiled
from ep_rebalance.planning.exchanges import best_exchange, held_cross
from ep_rebalance.planning.layer import (
    Change,
    Layer,
    apply_change,
    costliest_first,
    start_layer,
)
from ep_rebalance.planning.swaps import Swaps, best_swap, no_swaps

_RELIEVED_RANKS = 4
"""Costliest ranks whose experts are always tried for one more replica."""


@compiled
def improve_layer(
    moment_EE: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    num_ranks: int,
    max_moved: int,
    max_arrivals: int,
    price: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The changes that improve a layer, each the best on top of those before it.

    price: least gain for each slot that a change moves, in units of the mean square load of an
        even rank.

    Returns int64 [N, 4] and float64 [N]: for each change the slots moved and (slot, other, expert)
    as in `Change`, and the gain. After each of them `max_arrivals` holds on every rank and
    `max_moved` for their sum.
    """
    layer, swaps = start_layer(moment_EE, slots_P, num_ranks), no_swaps(num_ranks)
    limit = 4 * slots_P.size
    changes_N4, gains_N = np.empty((limit, 4), np.int64), np.empty(limit)
    count = 0
    while count < limit:
        change = _best_change(layer, swaps, max_moved, max_arrivals, price)
        if change.slot < 0 or change.price < price:
            break
        changes_N4[count] = (change.moved, change.slot, change.other, change.expert)
        gains_N[count] = change.gain
        apply_change(layer, change)
        count += 1
    return changes_N4[:count], gains_N[:count]


@compiled
def _best_change(
    layer: Layer, swaps: Swaps, max_moved: int, max_arrivals: int, price: float
) -> Change:
    """The best of all swaps and of the exchanges that relieve the costliest ranks.

    Experts of other ranks are tried only while nothing is found that is worth `price`.
    """
    best = best_swap(layer, swaps, max_moved, max_arrivals)
    held_cross_E = held_cross(layer)
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    ranks = costliest_first(layer)
    for index in range(ranks.size):
        if index >= _RELIEVED_RANKS and best.price >= price:
            break
        first = ranks[index] * slots_per_rank
        for slot in range(first, first + slots_per_rank):
            expert = int(layer.slots_P[slot])
            best = best_exchange(layer, expert, held_cross_E, max_moved, max_arrivals, best)
    return best
