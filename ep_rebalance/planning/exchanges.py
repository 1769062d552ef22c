"""Exchanges: a slot of an expert with several replicas is given to another expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.planning.compiled import compiled
from ep_rebalance.planning.layer import Change, Layer


@compiled
def held_cross(layer: Layer) -> NDArray[np.float64]:
    """float64 [E], sum of `cross_RE` over the ranks that hold the expert."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    held_cross_E = np.zeros(layer.replicas_E.size)
    for slot in range(layer.slots_P.size):
        expert = layer.slots_P[slot]
        held_cross_E[expert] += layer.cross_RE[slot // slots_per_rank, expert]
    return held_cross_E


@compiled
def best_exchange(
    layer: Layer,
    a: int,
    held_cross_E: NDArray[np.float64],
    max_moved: int,
    max_arrivals: int,
    best: Change,
) -> Change:
    """`best`, or a slot for one more replica of `a` that has a higher gain per moved slot."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    budget = max_moved - layer.arrivals_R.sum()
    for slot in range(layer.slots_P.size):
        rank, b = slot // slots_per_rank, layer.slots_P[slot]
        if layer.replicas_E[b] < 2 or layer.held_RE[rank, a]:
            continue
        gain = _exchange_gain(layer, held_cross_E, rank, a, b)
        moved = layer.origin_RE[rank, b] - layer.origin_RE[rank, a]
        price = gain / max(moved, 1)
        if (
            price > best.price
            and moved <= budget
            and layer.arrivals_R[rank] + moved <= max_arrivals
        ):
            best = Change(price, gain, moved, slot, -1, a)
    return best


@compiled
def _exchange_gain(
    layer: Layer, held_cross_E: NDArray[np.float64], rank: int, a: int, b: int
) -> float:
    """What the objective loses if `rank` gets a replica of `a` in place of `b`.

    Each rank that holds `a` is relieved of `less_a` of it, each other rank with `b` takes `more_b`.
    """
    moment_EE, cross_RE, replicas_E = layer.moment_EE, layer.cross_RE, layer.replicas_E
    part_a, part_b = 1.0 / (replicas_E[a] + 1), 1.0 / replicas_E[b]
    less_a, more_b = part_a / replicas_E[a], part_b / (replicas_E[b] - 1)
    gain: float = (
        2.0 * (held_cross_E[a] * less_a - (held_cross_E[b] - cross_RE[rank, b]) * more_b)
        - 2.0 * (cross_RE[rank, a] * part_a - cross_RE[rank, b] * part_b)
        - moment_EE[a, a] * (replicas_E[a] * less_a**2 + part_a**2)
        - moment_EE[b, b] * ((replicas_E[b] - 1) * more_b**2 + part_b**2)
        + 2.0 * moment_EE[a, b] * (layer.together_EE[a, b] * less_a * more_b + part_a * part_b)
    )
    return gain
