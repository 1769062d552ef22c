"""Exchanges: a slot of an expert with several replicas is given to another expert.

Where `a` arrives and `b` leaves, the vector `l` of a rank turns into `l + u + v`, with `u` a multiple
of the load vector of `a` and `v` one of that of `b`. Since

    |l + u + v|^2 = |l + u|^2 + |l + v|^2 - |l|^2 + 2 u.v

the gain is that of `a` alone, plus that of `b` alone, minus 2 u.v on every rank. Where one of the two
puts more load, the other puts less, so -u.v is a.b times a positive factor, and by Cauchy and Schwarz

    a.b <= mean_a mean_b + rest_a rest_b

which bounds the gain of most candidates without computing a.b.
"""

from __future__ import annotations

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.incremental.layer import (
    Change,
    LayerInputs,
    LayerState,
    fetched_by,
    inner_product,
    moved_by,
)
from ep_rebalance.planning.incremental.relief import Relief


@compiled
def best_copy(
    experts: LayerInputs,
    layer: LayerState,
    relief: Relief,
    left: int,
    max_arrivals: int,
    best: Change,
) -> Change:
    """`best`, or a change with a higher gain per move that gives an expert of the relieved rank one
    more replica elsewhere.

    left: slots that may still change in the layer.
    max_arrivals: experts. Bound on what arrives on one rank.
    """
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    held_RE, slots_P, fetch_RE = layer.held_RE, layer.slots_P, experts.fetch_RE
    spare_N, freed_N = relief.spare_N, relief.freed_N
    nodes_NE, node_R, traffic_E = layer.nodes_NE, experts.node_R, experts.traffic_E
    mean_E, rest_E = experts.vectors_VE[0], experts.rest_E
    for index in range(slots_per_rank):
        a = slots_P[relief.rank * slots_per_rank + index]
        part, product_R = experts.part_EC[a, layer.replicas_E[a] + 1], relief.product_SR[index]
        less, copied = relief.less_E[a], relief.copied_E[a]
        for n in range(spare_N.size):
            rank, b = spare_N[n] // slots_per_rank, slots_P[spare_N[n]]
            if held_RE[rank, a]:
                continue
            # |l|^2 - |l + part a|^2 = -2 part l.a - part^2 |a|^2, whose square is in `copied`.
            gain = copied + freed_N[n] - 2.0 * part * product_R[rank]
            if nodes_NE[node_R[rank], a] == 0:
                gain += traffic_E[a]
            # gain / max(fetches, 1) must exceed the best one.
            least = best.gain_per_move * max(fetch_RE[rank, a] - fetch_RE[rank, b], 1.0)
            product = mean_E[a] * mean_E[b] + rest_E[a] * rest_E[b]
            # -u.v is part * part_b * a.b on the slot's rank, less * more * a.b on ranks with both.
            both = part * relief.part_N[n]
            if gain + 2.0 * (both + less * relief.most_N[n]) * product > least:
                both += less * relief.more_N[n] * _shared_ranks(layer, a, b)
                if gain + 2.0 * both * product > least:
                    gain += 2.0 * both * inner_product(experts, a, b)
                    best = _better(experts, layer, spare_N[n], a, gain, left, max_arrivals, best)
    return best


@compiled
def best_drop(
    experts: LayerInputs,
    layer: LayerState,
    relief: Relief,
    left: int,
    max_arrivals: int,
    best: Change,
) -> Change:
    """`best`, or a change with a higher gain per move that gives a slot of the relieved rank, whose
    expert has another replica, to another expert.

    left, max_arrivals: as in `best_copy`.
    """
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    held_E, product_E, replicas_E = layer.held_RE[relief.rank], relief.product_E, layer.replicas_E
    nodes_E, traffic_E = layer.nodes_NE[experts.node_R[relief.rank]], experts.traffic_E
    copied_E, less_E, part_EC = relief.copied_E, relief.less_E, experts.part_EC
    fetch_E = experts.fetch_RE[relief.rank]
    mean_E, rest_E = experts.vectors_VE[0], experts.rest_E
    for n in range(relief.spare_N.size):
        slot = relief.spare_N[n]
        if slot // slots_per_rank != relief.rank:
            continue
        b, freed, part_b = layer.slots_P[slot], relief.freed_N[n], relief.part_N[n]
        more, most = relief.more_N[n], relief.most_N[n]
        for a in range(replicas_E.size):
            if held_E[a]:
                continue
            part = part_EC[a, replicas_E[a] + 1]
            # As in `best_copy`, but the slot is on the relieved rank.
            gain = copied_E[a] + freed - 2.0 * part * product_E[a]
            if nodes_E[a] == 0:
                gain += traffic_E[a]
            least = best.gain_per_move * max(fetch_E[a] - fetch_E[b], 1.0)
            product = mean_E[a] * mean_E[b] + rest_E[a] * rest_E[b]
            both = part * part_b
            if gain + 2.0 * (both + less_E[a] * most) * product > least:
                both += less_E[a] * more * _shared_ranks(layer, a, b)
                if gain + 2.0 * both * product > least:
                    gain += 2.0 * both * inner_product(experts, a, b)
                    best = _better(experts, layer, slot, a, gain, left, max_arrivals, best)
    return best


@compiled
def _shared_ranks(layer: LayerState, a: int, b: int) -> int:
    """How many ranks hold both experts."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    shared = 0
    for index in range(layer.replicas_E[b]):
        shared += int(layer.held_RE[layer.holders_EC[b, index] // slots_per_rank, a])
    return shared


@compiled
def _better(
    experts: LayerInputs,
    layer: LayerState,
    slot: int,
    a: int,
    gain: float,
    left: int,
    max_arrivals: int,
    best: Change,
) -> Change:
    """`best`, or expert `a` in `slot` if that is allowed and has a higher gain per move."""
    rank, b = slot * layer.arrivals_R.size // layer.slots_P.size, layer.slots_P[slot]
    moved = moved_by(experts, rank, a, b)
    gain_per_move = gain / max(fetched_by(experts, rank, a, b), 1.0)
    if (
        gain_per_move > best.gain_per_move
        and moved <= left
        and layer.arrivals_R[rank] + moved <= max_arrivals
    ):
        return Change(gain_per_move, gain, moved, int(slot), -1, int(a))
    return best
