"""Steepest descent on one layer's sum of squared rank loads.

With Q the second moment of the expert loads, `c` the replica counts and every replica taking an even part, the
objective is the sum over ranks of Q[a, b] / (c[a] c[b]) over all pairs of experts on the rank. `cross_RE[g, f]`, the
sum of Q[e, f] / c[e] over the experts e on rank g, scores any change in a handful of look-ups and is brought up to
date in O(E).

Letters: `E` logical experts, `P` slots, `R` ranks, `N` changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.planning.compiled import compiled

_SEARCHED_RANKS = 4
"""Costliest ranks that are searched first; all are only when these cannot be improved."""


class _Layer(NamedTuple):
    """Changed in place. held_RE, origin_RE: 1 where a rank holds the expert, now and before any change.
    together_EE: ranks that hold both experts (the diagonal is not used). arrivals_R: experts on a rank that were not there before."""

    moment_EE: NDArray[np.float64]
    slots_P: NDArray[np.int32]
    held_RE: NDArray[np.int64]
    origin_RE: NDArray[np.int64]
    together_EE: NDArray[np.int64]
    replicas_E: NDArray[np.int64]
    cross_RE: NDArray[np.float64]
    arrivals_R: NDArray[np.int64]


class _Change(NamedTuple):
    """`slot` receives `expert`, and `other` what was in `slot`; no slot but the first changes if `other` is -1.

    moved: slots that differ from the origin afterwards, less those before. price: gain for each of them.
    """

    price: float
    gain: float
    moved: int
    slot: int
    other: int
    expert: int


@compiled
def improve_layer(
    moment_EE: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    num_ranks: int,
    max_moved: int,
    max_arrivals: int,
    price: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The changes that improve a layer, each the best on top of those before it.

    price: least gain for each slot that a change moves, in units of the mean square load of an even rank.

    Returns int64 [N, 4], (moved, slot, other slot, expert) of each change, and float64 [N], their gains; see
    `_Change`. After each of them `max_arrivals` holds on every rank and `max_moved` for their sum.
    """
    layer = _start(moment_EE, slots_P, num_ranks)
    limit = 4 * slots_P.size
    changes_N4, gains_N = np.empty((limit, 4), np.int64), np.empty(limit)
    count = 0
    while count < limit:
        change = _next_change(layer, max_moved, max_arrivals, price)
        if change.price < price or change.slot < 0:
            break
        changes_N4[count] = (change.moved, change.slot, change.other, change.expert)
        gains_N[count] = change.gain
        count += 1
        _apply(layer, change)
    return changes_N4[:count], gains_N[:count]


@compiled
def _start(
    moment_EE: NDArray[np.float64], slots_P: NDArray[np.int32], num_ranks: int
) -> _Layer:
    num_experts = moment_EE.shape[0]
    held_RE = np.zeros((num_ranks, num_experts), np.int64)
    replicas_E = np.zeros(num_experts, np.int64)
    for slot in range(slots_P.size):
        held_RE[slot * num_ranks // slots_P.size, slots_P[slot]] = 1
        replicas_E[slots_P[slot]] += 1
    cross_RE = np.zeros((num_ranks, num_experts))
    together_EE = np.zeros((num_experts, num_experts), np.int64)
    for rank in range(num_ranks):
        for expert in np.flatnonzero(held_RE[rank]):
            cross_RE[rank] += moment_EE[expert] / replicas_E[expert]
            together_EE[expert] += held_RE[rank]
    arrivals_R = np.zeros(num_ranks, np.int64)
    return _Layer(
        moment_EE, slots_P.copy(), held_RE, held_RE.copy(), together_EE, replicas_E, cross_RE, arrivals_R
    )  # fmt: skip


@compiled
def _next_change(layer: _Layer, max_moved: int, max_arrivals: int, price: float) -> _Change:
    budget = max_moved - layer.arrivals_R.sum()
    ranks = np.argsort(-_rank_costs(layer))
    change = _best_change(layer, ranks[:_SEARCHED_RANKS], budget, max_arrivals)
    if change.price < price:
        change = _best_change(layer, ranks[_SEARCHED_RANKS:], budget, max_arrivals)
    return change


@compiled
def _rank_costs(layer: _Layer) -> NDArray[np.float64]:
    """Mean square load of each rank."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    cost_R = np.zeros(layer.arrivals_R.size)
    for slot in range(layer.slots_P.size):
        rank, expert = slot // slots_per_rank, layer.slots_P[slot]
        cost_R[rank] += layer.cross_RE[rank, expert] / layer.replicas_E[expert]
    return cost_R


@compiled
def _best_change(
    layer: _Layer, ranks: NDArray[np.int64], budget: int, max_arrivals: int
) -> _Change:
    """The change with the highest gain per moved slot that takes an expert, or load of one, off `ranks`."""
    best = _Change(0.0, 0.0, 0, -1, -1, -1)
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    held_cross_E = _held_cross(layer)
    for rank in ranks:
        for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
            best = _best_swap(layer, slot, budget, max_arrivals, best)
            best = _best_exchange(layer, slot, budget, max_arrivals, held_cross_E, best)
    return best


@compiled
def _held_cross(layer: _Layer) -> NDArray[np.float64]:
    """Sum of `cross_RE` over the ranks that hold the expert."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    held_cross_E = np.zeros(layer.replicas_E.size)
    for slot in range(layer.slots_P.size):
        held_cross_E[layer.slots_P[slot]] += layer.cross_RE[slot // slots_per_rank, layer.slots_P[slot]]
    return held_cross_E


@compiled
def _best_swap(
    layer: _Layer, slot: int, budget: int, max_arrivals: int, best: _Change
) -> _Change:
    """`best`, or a better swap of the expert in `slot` with one on another rank."""
    moment_EE, slots_P, held_RE, cross_RE = layer.moment_EE, layer.slots_P, layer.held_RE, layer.cross_RE
    slots_per_rank = slots_P.size // layer.arrivals_R.size
    here, a = slot // slots_per_rank, slots_P[slot]
    part_a = 1.0 / layer.replicas_E[a]
    for other in range(slots_P.size):
        there, b = other // slots_per_rank, slots_P[other]
        if held_RE[there, a] or held_RE[here, b]:
            continue
        part_b = 1.0 / layer.replicas_E[b]
        gain = -2.0 * (
            (cross_RE[here, b] - cross_RE[there, b]) * part_b
            + (cross_RE[there, a] - cross_RE[here, a]) * part_a
            + moment_EE[a, a] * part_a**2
            + moment_EE[b, b] * part_b**2
            - 2.0 * moment_EE[a, b] * part_a * part_b
        )
        if gain <= best.price:
            continue
        moved_here = layer.origin_RE[here, a] - layer.origin_RE[here, b]
        moved_there = layer.origin_RE[there, b] - layer.origin_RE[there, a]
        moved = moved_here + moved_there
        price = gain / max(moved, 1)
        if (
            price > best.price
            and moved <= budget
            and layer.arrivals_R[here] + moved_here <= max_arrivals
            and layer.arrivals_R[there] + moved_there <= max_arrivals
        ):
            best = _Change(price, gain, moved, slot, other, np.int64(b))
    return best


@compiled
def _best_exchange(
    layer: _Layer,
    slot: int,
    budget: int,
    max_arrivals: int,
    held_cross_E: NDArray[np.float64],
    best: _Change,
) -> _Change:
    """`best`, or a better slot for one more replica of the expert in `slot`, taken from an expert with several.

    Each rank with the expert `a` is relieved by `less_a`, each other rank with the displaced `b` gains `more_b`.
    """
    moment_EE, cross_RE, replicas_E = layer.moment_EE, layer.cross_RE, layer.replicas_E
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    a = layer.slots_P[slot]
    part_a = 1.0 / (replicas_E[a] + 1)
    less_a = part_a / replicas_E[a]
    for other in range(layer.slots_P.size):
        rank, b = other // slots_per_rank, layer.slots_P[other]
        if replicas_E[b] < 2 or layer.held_RE[rank, a]:
            continue
        part_b = 1.0 / replicas_E[b]
        more_b = part_b / (replicas_E[b] - 1)
        gain = (
            2.0 * (held_cross_E[a] * less_a - (held_cross_E[b] - cross_RE[rank, b]) * more_b)
            - moment_EE[a, a] * (replicas_E[a] * less_a**2 + part_a**2)
            - moment_EE[b, b] * ((replicas_E[b] - 1) * more_b**2 + part_b**2)
            + 2.0 * moment_EE[a, b] * (layer.together_EE[a, b] * less_a * more_b + part_a * part_b)
            - 2.0 * (cross_RE[rank, a] * part_a - cross_RE[rank, b] * part_b)
        )
        moved = layer.origin_RE[rank, b] - layer.origin_RE[rank, a]
        price = gain / max(moved, 1)
        if price > best.price and moved <= budget and layer.arrivals_R[rank] + moved <= max_arrivals:
            best = _Change(price, gain, moved, other, -1, np.int64(a))
    return best


@compiled
def _apply(layer: _Layer, change: _Change) -> None:
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    rank, expert = change.slot // slots_per_rank, change.expert
    displaced = np.int64(layer.slots_P[change.slot])
    if change.other >= 0:
        _replace(layer, change.other // slots_per_rank, expert, displaced)
        layer.slots_P[change.other] = displaced
    else:
        _recount(layer, expert, 1)
        _recount(layer, displaced, -1)
    _replace(layer, rank, displaced, expert)
    layer.slots_P[change.slot] = expert


@compiled
def _replace(layer: _Layer, rank: int, old: int, new: int) -> None:
    """Let `rank` hold `new` in place of `old`, at the replica counts of now."""
    layer.arrivals_R[rank] += layer.origin_RE[rank, old] - layer.origin_RE[rank, new]
    for expert, sign in ((old, -1), (new, 1)):
        layer.held_RE[rank, expert] += sign
        layer.together_EE[expert] += sign * layer.held_RE[rank]
        layer.together_EE[:, expert] += sign * layer.held_RE[rank]
        layer.cross_RE[rank] += sign * layer.moment_EE[expert] / layer.replicas_E[expert]


@compiled
def _recount(layer: _Layer, expert: int, extra: int) -> None:
    """Give the expert `extra` more replicas on paper: the ranks that hold it now carry another part of it."""
    before = layer.replicas_E[expert]
    layer.replicas_E[expert] += extra
    change = 1.0 / layer.replicas_E[expert] - 1.0 / before
    for rank in np.flatnonzero(layer.held_RE[:, expert]):
        layer.cross_RE[rank] += change * layer.moment_EE[expert]
