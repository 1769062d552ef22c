"""Relief: what is looked up again and again while changes for one overloaded rank are compared.

Inner loops run over experts, ranks or slots, never along what is summed up, so that the compiler
cannot change the order of a sum. They call nothing: handing over a tuple of arrays costs more than
the arithmetic of a candidate.

Letters of this module: `N` spare slots of all ranks, ordered by expert: those whose expert has another
replica. `S` are the slots of the relieved rank. Others as in `placement.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.layer import LayerInputs, LayerState


class Relief(NamedTuple):
    """What is looked up while changes for one rank are compared.

    A part is a fraction of an expert's load. Gains are in units of the squared mean rank load.

    rank: the rank to relieve.
    product_E: float64 [E]. Inner product of the rank's vector with every load vector.
    product_SR: float64 [S, R]. Inner products of its slots' load vectors with every rank's vector.
    less_E: float64 [E], parts. By how much the part of an expert on each of its ranks shrinks with one
        more replica.
    copied_E: float64 [E], gain. What one more replica brings, except what depends on the rank that
        gets it; minus infinity if it has as many as it may.
    spare_N: int64 [N]. The spare slots.
    freed_N: float64 [N], gain. What it brings to empty the slot and let the other replicas take over.
    more_N: float64 [N], parts. By how much the part on each of their ranks then grows.
    part_N: float64 [N], parts. What the rank of the slot is freed from.
    most_N: float64 [N], parts. What all other ranks get together.
    """

    rank: int
    product_E: NDArray[np.float64]
    product_SR: NDArray[np.float64]
    less_E: NDArray[np.float64]
    copied_E: NDArray[np.float64]
    spare_N: NDArray[np.int64]
    freed_N: NDArray[np.float64]
    more_N: NDArray[np.float64]
    part_N: NDArray[np.float64]
    most_N: NDArray[np.float64]


@compiled
def relief_of(experts: LayerInputs, layer: LayerState, rank: int) -> Relief:
    """The tables for relieving `rank` in the layer as it is now; the next change outdates them.

    Without redundant slots N is 0, and `less_E` and `copied_E` are zero.
    """
    num_slots, num_ranks = layer.slots_P.size, layer.arrivals_R.size
    less_E, copied_E = np.zeros(layer.replicas_E.size), np.zeros(layer.replicas_E.size)
    held_E = np.zeros(layer.replicas_E.size)
    spares = 0
    if num_slots > layer.replicas_E.size:
        spares = num_slots - np.sum(layer.replicas_E == 1)
        for slot in range(num_slots):
            held_E[layer.slots_P[slot]] += layer.product_P[slot]
        _set_copies(experts, layer, held_E, less_E, copied_E)
    relief = Relief(
        rank,
        np.zeros(layer.replicas_E.size),
        np.zeros((num_slots // num_ranks, num_ranks)),
        less_E,
        copied_E,
        np.zeros(spares, np.int64),
        np.zeros(spares),
        np.zeros(spares),
        np.zeros(spares),
        np.zeros(spares),
    )
    _set_products(experts, layer, relief)
    if spares:
        _set_spares(experts, layer, held_E, relief)
    return relief


@compiled
def _set_products(experts: LayerInputs, layer: LayerState, relief: Relief) -> None:
    # product_E[e] = l.v_e for the relieved rank's l, product_SR[i, r] = v_i.l_r for its i-th slot
    slots_per_rank = relief.product_SR.shape[0]
    for v in range(layer.load_VR.shape[0]):
        factor = layer.load_VR[v, relief.rank]
        for expert in range(relief.product_E.size):
            relief.product_E[expert] += factor * experts.vectors_VE[v, expert]
    for index in range(slots_per_rank):
        expert = layer.slots_P[relief.rank * slots_per_rank + index]
        for v in range(layer.load_VR.shape[0]):
            factor = experts.vectors_EV[expert, v]
            for other in range(relief.product_SR.shape[1]):
                relief.product_SR[index, other] += factor * layer.load_VR[v, other]


@compiled
def _set_copies(
    experts: LayerInputs,
    layer: LayerState,
    held_E: NDArray[np.float64],
    less_E: NDArray[np.float64],
    copied_E: NDArray[np.float64],
) -> None:
    most = min(layer.arrivals_R.size, experts.part_EC.shape[1] - 2)
    for a in range(less_E.size):
        count = layer.replicas_E[a]
        if count >= most:
            copied_E[a] = -np.inf
            continue
        before, part = experts.part_EC[a, count], experts.part_EC[a, count + 1]
        less_E[a] = before - part
        # |l|^2 - |l - less a|^2 = 2 less l.a - less^2 |a|^2 on each of the `count` ranks `l`. The rank
        # that takes the new replica costs part^2 |a|^2, if it were empty. held_E[a] is the sum of l.a.
        # own_E weighs the number of replicas times the square of the part.
        copied_E[a] = (
            2.0 * less_E[a] * held_E[a]
            - (count * less_E[a] ** 2 + part**2) * experts.square_E[a]
            + experts.own_E[a] * (count * before**2 - (count + 1) * part**2)
        )


@compiled
def _set_spares(
    experts: LayerInputs, layer: LayerState, held_E: NDArray[np.float64], relief: Relief
) -> None:
    slots_per_rank = relief.product_SR.shape[0]
    n = 0
    for b in range(layer.replicas_E.size):
        count = layer.replicas_E[b]
        if count < 2:
            continue
        part, after = experts.part_EC[b, count], experts.part_EC[b, count - 1]
        more = after - part
        fixed = experts.own_E[b] * (count * part**2 - (count - 1) * after**2)
        fixed -= (part**2 + (count - 1) * more**2) * experts.square_E[b]
        for index in range(count):
            slot = layer.holders_EC[b, index]
            own = layer.product_P[slot]
            relief.spare_N[n], relief.more_N[n] = slot, more
            # |l|^2 - |l - part b|^2 = 2 part l.b - part^2 |b|^2 on the slot's rank, and on the others
            # |l|^2 - |l + more b|^2 = -2 more l.b - more^2 |b|^2. The squares of `b` are in `fixed`.
            relief.freed_N[n] = fixed + 2.0 * part * own - 2.0 * more * (held_E[b] - own)
            if layer.nodes_NE[experts.node_R[slot // slots_per_rank], b] == 1:
                relief.freed_N[n] -= experts.traffic_E[b]
            relief.part_N[n], relief.most_N[n] = part, (count - 1) * more
            n += 1
