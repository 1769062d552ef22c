"""Descent on the sum of squared rank loads of one layer.

The costliest rank is relieved first, by the swap or exchange that gains most for what it moves.
"""

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
"""A layer is left as it is once this many ranks in a row could not be relieved."""


@compiled
def improve_layer(
    experts: LayerInputs,
    slots_P: NDArray[np.int32],
    max_moved: int,
    max_arrivals: int,
    least_gain_per_move: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The changes that improve a layer, each on top of those before it.

    slots_P: int32 [P]. The expert in each slot, as in `describe_experts`.
    max_moved: slots. Bound on all changes together.
    max_arrivals: experts. Bound on what arrives on one rank.
    least_gain_per_move: in units of the squared mean rank load. A move within a node must gain more.

    Returns int64 [N, 4] and float64 [N, 2] for N changes: (moved, slot, other, expert) and (gain,
    gain_per_move), as in `Change`. Both bounds hold after each change.
    """
    layer = start_layer(experts, slots_P)
    # Some changes bring experts back to where they were, so `max_moved` alone bounds nothing.
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
    """The best change for the costliest rank that can be relieved; its slot is -1 if there is none.

    A rank that could not be relieved is tried again only once its cost has grown by what a move must
    gain. After a few such ranks the layer is done, because it waits for its costliest ranks anyway.
    Ranks below the average are not tried.
    """
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
    """The costliest rank whose square has grown by `growth` since relieving it last failed; -1 if none."""
    costliest = -1
    for rank in range(layer.square_R.size):
        if layer.square_R[rank] > layer.failed_square_R[rank] + growth and (
            costliest < 0 or layer.square_R[rank] > layer.square_R[costliest]
        ):
            costliest = rank
    return costliest
