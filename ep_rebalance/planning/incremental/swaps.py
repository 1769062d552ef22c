"""Swaps: two experts on different ranks change places."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.layer import (
    Change,
    LayerInputs,
    LayerState,
    inner_product,
    moved_by,
)
from ep_rebalance.planning.incremental.relief import Relief


@compiled
def best_swap(
    experts: LayerInputs,
    layer: LayerState,
    relief: Relief,
    left: int,
    max_arrivals: int,
    best: Change,
) -> Change:
    """`best`, or a swap with a higher gain per move: of an expert of the relieved rank with one of a
    rank below the average.

    left: slots that may still change in the layer.
    max_arrivals: experts. Bound on what arrives on one rank.

    Most candidates are ruled out by the triangle inequality: two load vectors are at least as far
    apart as their means, and at least as far as the lengths of their rests.
    """
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    here, node_R, held_RE, slots_P = relief.rank, experts.node_R, layer.held_RE, layer.slots_P
    square_R, fetch_RE, traffic_E = layer.square_R, experts.fetch_RE, experts.traffic_E
    leaves_P, mean_P, rest_P = _elsewhere(experts, layer, relief)
    average = square_R.mean()
    for index in range(slots_per_rank):
        slot = here * slots_per_rank + index
        a, product_R = slots_P[slot], relief.product_SR[index]
        part_a = experts.part_EC[a, layer.replicas_E[a]]
        mean_a, rest_a = part_a * experts.vectors_VE[0, a], part_a * experts.rest_E[a]
        for there in range(product_R.size):
            if held_RE[there, a] or square_R[there] > average:
                continue
            leaves_a = part_a * (relief.product_E[a] - product_R[there])
            nearer = _nodes_gained(layer.nodes_NE, a, node_R[here], node_R[there])
            leaves_a += 0.5 * nearer * traffic_E[a]
            fetch_a = fetch_RE[there, a] - fetch_RE[here, a]
            # With x and y the loads that `a` and `b` put on their ranks h (here) and t (there),
            # |h|^2 - |h - x + y|^2 + |t|^2 - |t + x - y|^2 = 2 (x.(h - t) + y.(t - h) - |x - y|^2),
            # and |x - y|^2 >= means^2 + rests^2, the differences of their means and rests.
            for other in range(there * slots_per_rank, (there + 1) * slots_per_rank):
                gain = 2.0 * (leaves_a + leaves_P[other])
                means, rests = mean_a - mean_P[other], rest_a - rest_P[other]
                most = gain - 2.0 * (means**2 + rests**2)
                if most <= best.gain_per_move:
                    continue
                b = slots_P[other]
                fetched = max(fetch_a + fetch_RE[here, b] - fetch_RE[there, b], 1.0)
                if most > best.gain_per_move * fetched and not held_RE[here, b]:
                    part_b = experts.part_EC[b, layer.replicas_E[b]]
                    gain -= 2.0 * _square_distance(experts, a, part_a, b, part_b)
                    if gain > best.gain_per_move * fetched:
                        allowed, moved = _moved(experts, layer, slot, other, left, max_arrivals)
                        if allowed:
                            best = Change(gain / fetched, gain, moved, slot, other, int(b))
    return best


@compiled
def _elsewhere(
    experts: LayerInputs, layer: LayerState, relief: Relief
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(leaves_P, mean_P, rest_P) for the part of an expert's load that each slot puts on its rank: half
    the gain if it goes to the relieved rank, without its square; its mean; the length of the rest.
    """
    # With y that load, t the vector of its rank and h the relieved one: y.t - y.h.
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    node_R, near = experts.node_R, experts.node_R[relief.rank]
    leaves_P, mean_P = np.empty(layer.slots_P.size), np.empty(layer.slots_P.size)
    rest_P = np.empty(layer.slots_P.size)
    for slot in range(layer.slots_P.size):
        b = layer.slots_P[slot]
        part = experts.part_EC[b, layer.replicas_E[b]]
        nearer = _nodes_gained(layer.nodes_NE, b, node_R[slot // slots_per_rank], near)
        leaves_P[slot] = part * (layer.product_P[slot] - relief.product_E[b])
        leaves_P[slot] += 0.5 * nearer * experts.traffic_E[b]
        mean_P[slot], rest_P[slot] = part * experts.vectors_VE[0, b], part * experts.rest_E[b]
    return leaves_P, mean_P, rest_P


@compiled
def _nodes_gained(nodes_NE: NDArray[np.int64], expert: int, source: int, target: int) -> int:
    """How many more nodes hold the expert after a rank of node `source` gives it to one of `target`."""
    if source == target:
        return 0
    return int(nodes_NE[target, expert] == 0) - int(nodes_NE[source, expert] == 1)


@compiled
def _moved(
    experts: LayerInputs, layer: LayerState, slot: int, other: int, left: int, max_arrivals: int
) -> tuple[bool, int]:
    """Whether the bounds allow the swap of the two slots, and `moved` as in `Change`."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    here, there = slot // slots_per_rank, other // slots_per_rank
    a, b = int(layer.slots_P[slot]), int(layer.slots_P[other])
    moved_here, moved_there = moved_by(experts, here, b, a), moved_by(experts, there, a, b)
    allowed = (
        moved_here + moved_there <= left
        and layer.arrivals_R[here] + moved_here <= max_arrivals
        and layer.arrivals_R[there] + moved_there <= max_arrivals
    )
    return allowed, moved_here + moved_there


@compiled
def _square_distance(experts: LayerInputs, a: int, part_a: float, b: int, part_b: float) -> float:
    # |x - y|^2 with x = part_a v_a and y = part_b v_b
    distance: float = (
        part_a**2 * experts.square_E[a]
        + part_b**2 * experts.square_E[b]
        - 2.0 * part_a * part_b * inner_product(experts, a, b)
    )
    return distance
