"""Swaps: two experts on different ranks change places."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.planning.compiled import compiled
from ep_rebalance.planning.layer import Change, Layer


class Swaps(NamedTuple):
    """Best swap of each pair of ranks (first > second), remembered until one of them is stale.

    price_RR: 0 where no swap gains anything.
    slots_RR2: the slots on the first and on the second rank.
    """

    price_RR: NDArray[np.float64]
    gain_RR: NDArray[np.float64]
    moved_RR: NDArray[np.int64]
    slots_RR2: NDArray[np.int64]


@compiled
def no_swaps(num_ranks: int) -> Swaps:
    return Swaps(
        np.zeros((num_ranks, num_ranks)),
        np.zeros((num_ranks, num_ranks)),
        np.zeros((num_ranks, num_ranks), np.int64),
        np.zeros((num_ranks, num_ranks, 2), np.int64),
    )


@compiled
def best_swap(layer: Layer, swaps: Swaps, max_moved: int, max_arrivals: int) -> Change:
    """The swap with the highest gain per moved slot; brings `swaps` up to date."""
    _refresh(layer, swaps, max_moved - layer.arrivals_R.sum(), max_arrivals)
    pair = np.argmax(swaps.price_RR)
    first, second = pair // layer.stale_R.size, pair % layer.stale_R.size
    price = swaps.price_RR[first, second]
    if price <= 0.0:
        return Change(0.0, 0.0, 0, -1, -1, -1)
    slot, other = swaps.slots_RR2[first, second, 0], swaps.slots_RR2[first, second, 1]
    gain, moved = swaps.gain_RR[first, second], swaps.moved_RR[first, second]
    return Change(price, gain, moved, slot, other, int(layer.slots_P[other]))


@compiled
def _refresh(layer: Layer, swaps: Swaps, budget: int, max_arrivals: int) -> None:
    """Search the pairs with a stale rank again; all pairs once two moves are no longer allowed."""
    for first in range(layer.stale_R.size):
        for second in range(first):
            if layer.stale_R[first] or layer.stale_R[second] or budget < 2:
                _search_pair(layer, swaps, first, second, budget, max_arrivals)
    layer.stale_R[:] = False


@compiled
def _search_pair(
    layer: Layer, swaps: Swaps, first: int, second: int, budget: int, max_arrivals: int
) -> None:
    slots_P, origin_RE = layer.slots_P, layer.origin_RE
    slots_per_rank = slots_P.size // layer.arrivals_R.size
    best = 0.0
    for slot in range(first * slots_per_rank, (first + 1) * slots_per_rank):
        a = slots_P[slot]
        if layer.held_RE[second, a]:
            continue
        for other in range(second * slots_per_rank, (second + 1) * slots_per_rank):
            b = slots_P[other]
            if layer.held_RE[first, b]:
                continue
            gain = _swap_gain(layer, first, second, a, b)
            if gain <= best:
                continue
            moved_first = origin_RE[first, a] - origin_RE[first, b]
            moved_second = origin_RE[second, b] - origin_RE[second, a]
            moved = moved_first + moved_second
            price = gain / max(moved, 1)
            if (
                price > best
                and moved <= budget
                and layer.arrivals_R[first] + moved_first <= max_arrivals
                and layer.arrivals_R[second] + moved_second <= max_arrivals
            ):
                best = price
                swaps.gain_RR[first, second] = gain
                swaps.moved_RR[first, second] = moved
                swaps.slots_RR2[first, second] = (slot, other)
    swaps.price_RR[first, second] = best


@compiled
def _swap_gain(layer: Layer, first: int, second: int, a: int, b: int) -> float:
    """What the objective loses if `a` leaves `first` for `second` and `b` comes back."""
    moment_EE, cross_RE = layer.moment_EE, layer.cross_RE
    part_a, part_b = 1.0 / layer.replicas_E[a], 1.0 / layer.replicas_E[b]
    loss: float = 2.0 * (
        (cross_RE[first, b] - cross_RE[second, b]) * part_b
        + (cross_RE[second, a] - cross_RE[first, a]) * part_a
        + moment_EE[a, a] * part_a**2
        + moment_EE[b, b] * part_b**2
        - 2.0 * moment_EE[a, b] * part_a * part_b
    )
    return -loss
