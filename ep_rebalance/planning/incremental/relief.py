"""Relief: what is looked up again and again while changes for one overloaded rank are compared.

Inner loops run over experts, ranks or slots, so that no order of summation is left to the compiler,
and call nothing: to hand a tuple of arrays over costs more than a candidate's arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.layer import LayerInputs, LayerState


class Relief(NamedTuple):
    """rank: the one to relieve.

    product_E: products of its vector with every load vector.
    product_SR: products of the load vectors of its slots with every rank's vector.
    less_E: by how much the part on each rank that holds an expert shrinks with one more replica.
    copied_E: what the objective gains by one more replica, before anything that depends on where it
        comes; minus infinity where all ranks hold the expert.
    spare_N: slots whose expert has another replica; the fields below are of these.
    freed_N: what the objective gains if the slot is emptied and the other ranks take over its part.
    more_N: by how much the part on each of those then grows.
    part_N: the part that the slot's rank is freed from. most_N: sum of what all other ranks get.
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
    """What `Relief` says, for the layer as it is now; it is out of date after the next change.

    E are all experts, R all ranks, S the slots of `rank`, N the spare slots of all ranks, by expert.
    Parts are fractions of an expert's load; products and gains are in units of the squared mean rank
    load. Without redundant slots `less_E` and `copied_E` are zero and N is 0.
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
    for a in range(less_E.size):
        count = layer.replicas_E[a]
        if count == layer.arrivals_R.size:
            copied_E[a] = -np.inf
            continue
        before, part = experts.part_EC[a, count], experts.part_EC[a, count + 1]
        less_E[a] = before - part
        # |l|^2 - |l - less a|^2 = 2 less l.a - less^2 |a|^2 on each rank `l` of the `count`, and an
        # empty rank that takes the new replica costs part^2 |a|^2. held_E[a] is the sum of l.a.
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
