"""One layer while the incremental planner works on it.

An expert `e` with `c` replicas puts `part_EC[e, c]` of its load vector `v_e` on each rank that holds
it. The vector of a rank is the sum of what it gets, and the planner minimises

    sum over ranks of |l_r|^2                  l_r = sum over its experts of part_EC[e, c] v_e
    + sum over experts of c part_EC[e, c]^2 own_E[e]
    - sum over experts of traffic_E[e] (nodes that hold e)

From products of rank vectors with load vectors any change is scored in a handful of look-ups.

Letters of this module: `V` coordinates of a load vector, `N` nodes; others as in `placement.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.load_vectors import load_vectors


class LayerInputs(NamedTuple):
    """What does not change while a layer is planned.

    Loads are in units of the mean rank load, so squares, products and gains are in units of its
    square.

    vectors_EV: float64 [E, V]. As returned by `load_vectors`.
    vectors_VE: float64 [V, E]. Its transpose, with contiguous rows.
    own_E: float64 [E]. As returned by `load_vectors`.
    square_E: float64 [E]. Squared lengths of the vectors.
    rest_E: float64 [E]. Their lengths without the first coordinate, which is the mean.
    part_EC: float64 [E, max_replicas + 2]. The share of an expert's load on each of its ranks, by the
        number of its replicas. Column 0 has no meaning; no expert ends up in the last one, which the
        first half of a swap may reach.
    fetch_RE: float64 [R, E], moves within a node. Price of bringing the expert to the rank; 0 where
        the rank held it before any change.
    traffic_E: float64 [E]. What the objective gains with each further node that holds the expert.
    node_R: int64 [R]. The node of each rank.
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
    """What changes while a layer is planned; `apply_change` updates it in place.

    slots_P: int64 [P]. The expert in each slot.
    replicas_E: int64 [E]. How many slots hold each expert.
    holders_EC: int64 [E, max_replicas + 2]. Which slots these are, in the first `replicas_E` columns.
    held_RE: bool [R, E]. Whether a rank holds the expert.
    nodes_NE: int64 [N, E]. How many ranks of a node hold the expert.
    load_VR: float64 [V, R]. The rank vectors, one in each column.
    square_R: float64 [R]. Their squared lengths.
    product_P: float64 [P]. Inner product of a slot's load vector with the vector of its rank.
    arrivals_R: int64 [R], experts. On the rank now, but not before any change.
    stale_R: bool [R]. Whether the rank's square and products are out of date.
    failed_square_R: float64 [R]. The rank's square when relieving it last failed; 0 before.
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
    """A swap or an exchange.

    A swap gives `slot` the `expert` of the slot `other`, and `other` the expert of `slot`. An exchange
    gives `slot` one more replica of `expert`; `other` is -1. If `slot` is -1 there is no change.

    gain_per_move: gain / max(price of its fetches, 1), where a fetch within a node costs 1.
    gain: by how much the objective falls.
    moved: slots. How many more differ from the layer before any change.
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
    """The inputs of a layer.

    cost_WE, weight_W: as in `load_vectors`.
    part_EC: as in `LayerInputs`.
    slots_P: int32 [P]. The expert in each slot before any change.
    node_R: int64 [R]. The node of each rank.
    internode_price: moves within a node. What a move from another node costs.
    token_price: tokens. What a token that crosses a node boundary costs, in tokens computed.
    """
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
    # Tokens come evenly from all nodes, so each further node that holds an expert keeps 1 / nodes of
    # its tokens from crossing. The slope of l^2 at the mean load of 1 turns load into squares: 2.
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

    slots_P: int32 [P]. The expert in each slot; the same as in `describe_experts`.
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
    """Set who holds what, and the rank vectors.

    It calls nothing, for speed: it runs for every layer of every plan.
    """
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
    """By how much the slots of `rank` that differ from the layer before any change grow in number
    if `arrives` replaces `leaves` there: -1, 0 or 1.
    """
    after, before = experts.fetch_RE[rank, arrives] > 0.0, experts.fetch_RE[rank, leaves] > 0.0
    return int(after) - int(before)


@compiled
def fetched_by(experts: LayerInputs, rank: int, arrives: int, leaves: int) -> float:
    """Price of fetching `arrives`, minus what is saved because `leaves` need not be fetched."""
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
    """Make the change in place, and update everything that depends on it except `failed_square_R`.

    Only `slot`, `other` and `expert` are read. Whether the change is allowed is not checked.
    """
    arrives, leaves = change.expert, layer.slots_P[change.slot]
    if change.other >= 0:
        _replace(experts, layer, change.other, arrives, leaves)
    _replace(experts, layer, change.slot, leaves, arrives)
    _refresh_products(experts, layer)


@compiled
def _replace(experts: LayerInputs, layer: LayerState, slot: int, old: int, new: int) -> None:
    """Let `slot` hold `new` instead of `old`.

    Between the two calls of a swap both replica counts are off by one. The second call corrects the
    loads that the first one leaves behind.
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
    """Add the expert to all ranks that hold it, or take it off them, at its current replica count.

    sign: 1 to add, -1 to take off.
    """
    # l_r += sign part_EC[e, c] v_e
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
    # square_R[r] = |l_r|^2 and product_P[p] = l_r.v_e, for the rank r of slot p and its expert e
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
