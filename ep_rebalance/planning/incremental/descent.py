"""Descent on one layer's sum of squared rank loads: the costliest rank is relieved first, by the
swap or exchange that gains most for what it moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.exchanges import best_copy, best_drop
from ep_rebalance.planning.incremental.layer import (
    Change,
    LayerInputs,
    LayerState,
    apply_change,
    start_layer,
)
from ep_rebalance.planning.incremental.relief import relief_of
from ep_rebalance.planning.incremental.swaps import best_swap

_TRIED_IN_VAIN = 3
"""Ranks that are tried in vain, one after the other, before a layer is left as it is."""


@compiled
def improve_layer(
    experts: LayerInputs,
    slots_P: NDArray[np.int32],
    max_moved: int,
    max_arrivals: int,
    least_gain_per_move: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The changes that improve a layer, each on top of those before it.

    least_gain_per_move: least gain for a move within a node, in units of the mean square load of an even
        rank.

    Returns int64 [N, 4] and float64 [N, 2]: for each change the slots moved and (slot, other,
    expert) as in `Change`, and its gain and gain per move. After each of them `max_arrivals` holds on every
    rank and `max_moved` for their sum.
    """
    layer = start_layer(experts, slots_P)
    limit = 4 * slots_P.size
    changes_N4, gains_N2 = np.empty((limit, 4), np.int64), np.empty((limit, 2))
    count = 0
    while count < limit and layer.arrivals_R.sum() < max_moved:
        change = _next_change(experts, layer, max_moved, max_arrivals, least_gain_per_move)
        if change.slot < 0:
            break
        changes_N4[count] = (change.moved, change.slot, change.other, change.expert)
        gains_N2[count] = (change.gain, change.gain_per_move)
        apply_change(experts, layer, change)
        count += 1
    return changes_N4[:count], gains_N2[:count]


@compiled
def _next_change(
    experts: LayerInputs,
    layer: LayerState,
    max_moved: int,
    max_arrivals: int,
    least_gain_per_move: float,
) -> Change:
    """For the costliest rank that can be relieved. One that could not is tried again only after it
    became costlier by what a move must gain. After a few the layer is done, since it waits for its
    costliest ranks; ranks below the average are not tried."""
    left = max_moved - layer.arrivals_R.sum()
    average = layer.square_R.mean()
    nothing = Change(least_gain_per_move, 0.0, 0, -1, -1, -1)
    for _ in range(_TRIED_IN_VAIN):
        rank = _costliest(layer, least_gain_per_move)
        if rank < 0 or layer.square_R[rank] < average:
            return nothing
        relief = relief_of(experts, layer, rank)
        best = best_swap(experts, layer, relief, left, max_arrivals, nothing)
        best = best_copy(experts, layer, relief, left, max_arrivals, best)
        best = best_drop(experts, layer, relief, left, max_arrivals, best)
        if best.slot >= 0:
            return best
        layer.failed_square_R[rank] = layer.square_R[rank]
    return nothing


@compiled
def _costliest(layer: LayerState, growth: float) -> int:
    """Of the ranks whose square has grown by `growth` since they were tried in vain; -1 if none."""
    costliest = -1
    for rank in range(layer.square_R.size):
        if layer.square_R[rank] > layer.failed_square_R[rank] + growth and (
            costliest < 0 or layer.square_R[rank] > layer.square_R[costliest]
        ):
            costliest = rank
    return costliest
