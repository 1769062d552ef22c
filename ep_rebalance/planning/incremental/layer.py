"""One layer while the incremental planner works on it.

An expert with `c` replicas puts `part_EC[e, c]` of its load vector on each rank that holds it; a
rank is the sum of what it gets, and the objective is the sum of the ranks' squares. Products of rank
vectors with load vectors score any change in a handful of look-ups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.load_vectors import load_vectors


class LayerInputs(NamedTuple):
    """What does not change while a layer is planned.

    vectors_EV, own_E: as `load_vectors` returns them; vectors_VE is the transpose, laid out by rows.
    square_E: squares of the vectors. rest_E: their lengths without the first coordinate, the mean.
    part_EC: float64 [E, C + 2], part of an expert's load on each of its ranks, by number of
        replicas; column 0 means nothing, the last is only passed through.
    fetch_RE: cost of giving the expert to the rank in units of a move within a node; 0 where the
        rank holds it before any change.
    traffic_E: what the objective gains for each node more that holds the expert.
    """

    vectors_EV: NDArray[np.float64]
    vectors_VE: NDArray[np.float64]
    own_E: NDArray[np.float64]
    square_E: NDArray[np.float64]
    rest_E: NDArray[np.float64]
    part_EC: NDArray[np.float64]
    fetch_RE: NDArray[np.float64]
    traffic_E: NDArray[np.float64]
    node_R: NDArray[np.int64]


class LayerState(NamedTuple):
    """Changed in place by `apply_change`.

    replicas_E, holders_EC: how many slots hold each expert, and which (the first `replicas_E`).
    held_RE: whether a rank holds the expert.
    nodes_NE: how many ranks of a node hold the expert.
    load_VR: the rank vectors, one in each column; square_R are their squares.
    product_P: product of the slot's load vector with its rank's vector.
    arrivals_R: experts on a rank that were not there before.
    stale_R: ranks whose square and products are out of date.
    failed_square_R: the rank's square when relieving it was last tried in vain; 0 before.
    """

    slots_P: NDArray[np.int64]
    replicas_E: NDArray[np.int64]
    holders_EC: NDArray[np.int64]
    held_RE: NDArray[np.bool_]
    nodes_NE: NDArray[np.int64]
    load_VR: NDArray[np.float64]
    square_R: NDArray[np.float64]
    product_P: NDArray[np.float64]
    arrivals_R: NDArray[np.int64]
    stale_R: NDArray[np.bool_]
    failed_square_R: NDArray[np.float64]


class Change(NamedTuple):
    """A swap gives `slot` the `expert` of the slot `other` and the other way round; an exchange
    gives `slot` one more replica of `expert`, and `other` is -1. No change has a `slot` of -1.

    moved: slots that differ from the origin afterwards, less those before.
    gain_per_move: gain for each of them, fetches from other nodes counted dearer.
    """

    gain_per_move: float
    gain: float
    moved: int
    slot: int
    other: int
    expert: int


@compiled
def describe_experts(
    cost_WE: NDArray[np.float64],
    weight_W: NDArray[np.float64],
    part_EC: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    node_R: NDArray[np.int64],
    internode_price: float,
    token_price: float,
) -> LayerInputs:
    """cost_WE, weight_W: as for `load_vectors`. internode_price: of a move from another node, in
    those within one. token_price: of a token that crosses a node boundary, in those of computing
    it."""
    num_ranks, num_nodes = node_R.size, node_R.max() + 1
    vectors_EV, own_E = load_vectors(cost_WE, weight_W, num_ranks)
    square_E = np.sum(vectors_EV**2, axis=1)
    at_node_NE = np.zeros((num_nodes, own_E.size), np.bool_)
    fetch_RE = np.full((num_ranks, own_E.size), internode_price)
    for slot in range(slots_P.size):
        at_node_NE[node_R[slot * num_ranks // slots_P.size], slots_P[slot]] = True
    for rank in range(num_ranks):
        for expert in range(own_E.size):
            if at_node_NE[node_R[rank], expert]:
                fetch_RE[rank, expert] = 1.0
    for slot in range(slots_P.size):
        fetch_RE[slot * num_ranks // slots_P.size, slots_P[slot]] = 0.0
    return LayerInputs(
        vectors_EV,
        vectors_EV.T.copy(),
        own_E,
        square_E,
        np.sqrt(square_E - vectors_EV[:, 0] ** 2),
        part_EC,
        fetch_RE,
        2.0 * token_price / num_nodes * vectors_EV[:, 0],
        node_R,
    )


@compiled
def start_layer(experts: LayerInputs, slots_P: NDArray[np.int32]) -> LayerState:
    """The layer before any change: nothing has arrived, no rank was tried.

    slots_P: int32 [P], the expert in each slot, as `experts` was described with. Loads are in units
    of the mean rank load, so squares and products are in units of its square.
    """
    num_experts, width = experts.vectors_EV.shape
    num_ranks, num_nodes = experts.node_R.size, experts.node_R.max() + 1
    layer = LayerState(
        slots_P.astype(np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, experts.part_EC.shape[1]), np.int64),
        np.zeros((num_ranks, num_experts), np.bool_),
        np.zeros((num_nodes, num_experts), np.int64),
        np.zeros((width, num_ranks)),
        np.zeros(num_ranks),
        np.zeros(slots_P.size),
        np.zeros(num_ranks, np.int64),
        np.ones(num_ranks, np.bool_),
        np.zeros(num_ranks),
    )
    _fill(experts, layer)
    _refresh_products(experts, layer)
    return layer


@compiled
def _fill(experts: LayerInputs, layer: LayerState) -> None:
    """Who holds what, and the loads. Calls nothing: this is done for every layer of every plan."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    slots_P, replicas_E, holders_EC = layer.slots_P, layer.replicas_E, layer.holders_EC
    held_RE, nodes_NE, node_R = layer.held_RE, layer.nodes_NE, experts.node_R
    for slot in range(slots_P.size):
        rank, expert = slot // slots_per_rank, slots_P[slot]
        held_RE[rank, expert] = True
        nodes_NE[node_R[rank], expert] += 1
        holders_EC[expert, replicas_E[expert]] = slot
        replicas_E[expert] += 1
    load_VR, vectors_EV, part_EC = layer.load_VR, experts.vectors_EV, experts.part_EC
    for slot in range(slots_P.size):
        rank, expert = slot // slots_per_rank, slots_P[slot]
        part = part_EC[expert, replicas_E[expert]]
        for v in range(load_VR.shape[0]):
            load_VR[v, rank] += part * vectors_EV[expert, v]


@compiled
def moved_by(experts: LayerInputs, rank: int, arrives: int, leaves: int) -> int:
    """Slots of `rank` that differ from the origin after the replacement, less those before."""
    after, before = experts.fetch_RE[rank, arrives] > 0.0, experts.fetch_RE[rank, leaves] > 0.0
    return int(after) - int(before)


@compiled
def fetched_by(experts: LayerInputs, rank: int, arrives: int, leaves: int) -> float:
    """Price of the replacement's fetch, less what is saved if a fetched expert leaves."""
    fetched: float = experts.fetch_RE[rank, arrives] - experts.fetch_RE[rank, leaves]
    return fetched


@compiled
def inner_product(experts: LayerInputs, a: int, b: int) -> float:
    total = 0.0
    for v in range(experts.vectors_EV.shape[1]):
        total += experts.vectors_EV[a, v] * experts.vectors_EV[b, v]
    return total


@compiled
def apply_change(experts: LayerInputs, layer: LayerState, change: Change) -> None:
    """Make the change in `layer`, in place, with all that depends on it but `failed_square_R`.

    Only `slot`, `other` and `expert` are read; whether the change is allowed is not checked.
    """
    arrives, leaves = change.expert, layer.slots_P[change.slot]
    if change.other >= 0:
        _replace(experts, layer, change.other, arrives, leaves)
    _replace(experts, layer, change.slot, leaves, arrives)
    _refresh_products(experts, layer)


@compiled
def _replace(experts: LayerInputs, layer: LayerState, slot: int, old: int, new: int) -> None:
    """Let `slot` hold `new` in place of `old`. Between the two calls of a swap both replica counts
    are off by one; the loads that the first leaves with them are put right by the second.
    """
    rank = slot * layer.arrivals_R.size // layer.slots_P.size
    layer.arrivals_R[rank] += moved_by(experts, rank, new, old)
    _add_load(experts, layer, old, -1.0)
    _add_load(experts, layer, new, -1.0)
    _release(experts, layer, slot, old)
    _hold(experts, layer, slot, new)
    _add_load(experts, layer, old, 1.0)
    _add_load(experts, layer, new, 1.0)
    layer.slots_P[slot] = new


@compiled
def _add_load(experts: LayerInputs, layer: LayerState, expert: int, sign: float) -> None:
    """Add the expert to, or take it off, all ranks that hold it, at the replica count of now."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    factor = sign * experts.part_EC[expert, layer.replicas_E[expert]]
    for index in range(layer.replicas_E[expert]):
        rank = layer.holders_EC[expert, index] // slots_per_rank
        layer.stale_R[rank] = True
        for v in range(layer.load_VR.shape[0]):
            layer.load_VR[v, rank] += factor * experts.vectors_EV[expert, v]


@compiled
def _hold(experts: LayerInputs, layer: LayerState, slot: int, expert: int) -> None:
    rank = slot * layer.arrivals_R.size // layer.slots_P.size
    layer.held_RE[rank, expert] = True
    layer.nodes_NE[experts.node_R[rank], expert] += 1
    layer.holders_EC[expert, layer.replicas_E[expert]] = slot
    layer.replicas_E[expert] += 1


@compiled
def _release(experts: LayerInputs, layer: LayerState, slot: int, expert: int) -> None:
    rank = slot * layer.arrivals_R.size // layer.slots_P.size
    layer.held_RE[rank, expert] = False
    layer.nodes_NE[experts.node_R[rank], expert] -= 1
    layer.replicas_E[expert] -= 1
    layer.stale_R[rank] = True
    last = layer.replicas_E[expert]
    for index in range(last):
        if layer.holders_EC[expert, index] == slot:
            layer.holders_EC[expert, index] = layer.holders_EC[expert, last]


@compiled
def _refresh_products(experts: LayerInputs, layer: LayerState) -> None:
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    load_V = np.empty(layer.load_VR.shape[0])
    slots_P, product_P, vectors_EV = layer.slots_P, layer.product_P, experts.vectors_EV
    for rank in range(layer.arrivals_R.size):
        if layer.stale_R[rank]:
            layer.stale_R[rank] = False
            load_V[:] = layer.load_VR[:, rank]
            layer.square_R[rank] = np.sum(load_V * load_V)
            for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
                total = 0.0
                for v in range(load_V.size):
                    total += load_V[v] * vectors_EV[slots_P[slot], v]
                product_P[slot] = total
