"""One layer while the incremental planner works on it.

With Q the second moment of the expert loads, `c` the replica counts and every replica taking an
even part, the objective is the sum over ranks of Q[a, b] / (c[a] c[b]) over all pairs of experts
on the rank. `cross_RE[g, f]`, the sum of Q[e, f] / c[e] over the experts e on rank g, scores any
change in a handful of look-ups and is brought up to date in O(E).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.planning.compiled import compiled


class Layer(NamedTuple):
    """Changed in place by `apply_change`.

    held_RE, origin_RE: 1 where a rank holds the expert, now and before any change.
    together_EE: number of ranks that hold both experts; the diagonal means nothing.
    arrivals_R: experts on a rank that were not there before.
    stale_R: ranks whose experts or loads have changed since their swaps were searched.
    """

    moment_EE: NDArray[np.float64]
    slots_P: NDArray[np.int64]
    held_RE: NDArray[np.int64]
    origin_RE: NDArray[np.int64]
    together_EE: NDArray[np.int64]
    replicas_E: NDArray[np.int64]
    cross_RE: NDArray[np.float64]
    arrivals_R: NDArray[np.int64]
    stale_R: NDArray[np.bool_]


class Change(NamedTuple):
    """A swap gives `slot` the `expert` of the slot `other` and the other way round; an exchange
    gives `slot` one more replica of `expert`, and `other` is -1. No change has a `slot` of -1.

    moved: slots that differ from the origin afterwards, less those before.
    price: gain for each of them.
    """

    price: float
    gain: float
    moved: int
    slot: int
    other: int
    expert: int


@compiled
def start_layer(
    moment_EE: NDArray[np.float64], slots_P: NDArray[np.int32], num_ranks: int
) -> Layer:
    num_experts = moment_EE.shape[0]
    held_RE = np.zeros((num_ranks, num_experts), np.int64)
    for slot in range(slots_P.size):
        held_RE[slot * num_ranks // slots_P.size, slots_P[slot]] = 1
    replicas_E = held_RE.sum(axis=0)
    cross_RE = np.zeros((num_ranks, num_experts))
    together_EE = np.zeros((num_experts, num_experts), np.int64)
    for rank in range(num_ranks):
        for expert in range(num_experts):
            if held_RE[rank, expert]:
                cross_RE[rank] += moment_EE[expert] / replicas_E[expert]
                together_EE[expert] += held_RE[rank]
    return Layer(
        moment_EE,
        slots_P.astype(np.int64),
        held_RE,
        held_RE.copy(),
        together_EE,
        replicas_E,
        cross_RE,
        np.zeros(num_ranks, np.int64),
        np.ones(num_ranks, np.bool_),
    )


@compiled
def costliest_first(layer: Layer) -> NDArray[np.int64]:
    """int64 [R], ranks by falling mean square load."""
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    cost_R = np.zeros(layer.arrivals_R.size)
    for slot in range(layer.slots_P.size):
        rank, expert = slot // slots_per_rank, layer.slots_P[slot]
        cost_R[rank] += layer.cross_RE[rank, expert] / layer.replicas_E[expert]
    order_R = np.zeros(cost_R.size, np.int64)
    for index in range(cost_R.size):
        order_R[index] = np.argmax(cost_R)
        cost_R[order_R[index]] = -np.inf
    return order_R


@compiled
def apply_change(layer: Layer, change: Change) -> None:
    slots_per_rank = layer.slots_P.size // layer.arrivals_R.size
    displaced = int(layer.slots_P[change.slot])
    if change.other >= 0:
        _replace(layer, change.other // slots_per_rank, change.expert, displaced)
        layer.slots_P[change.other] = displaced
    else:
        _recount(layer, change.expert, 1)
        _recount(layer, displaced, -1)
    _replace(layer, change.slot // slots_per_rank, displaced, change.expert)
    layer.slots_P[change.slot] = change.expert


@compiled
def _replace(layer: Layer, rank: int, old: int, new: int) -> None:
    """Let `rank` hold `new` in place of `old`, at the replica counts of now."""
    layer.stale_R[rank] = True
    layer.arrivals_R[rank] += layer.origin_RE[rank, old] - layer.origin_RE[rank, new]
    for expert, sign in ((old, -1), (new, 1)):
        layer.held_RE[rank, expert] += sign
        layer.together_EE[expert] += sign * layer.held_RE[rank]
        layer.together_EE[:, expert] += sign * layer.held_RE[rank]
        layer.cross_RE[rank] += sign * layer.moment_EE[expert] / layer.replicas_E[expert]


@compiled
def _recount(layer: Layer, expert: int, extra: int) -> None:
    """Count `extra` more replicas, so that each rank with the expert carries another part of it."""
    before = layer.replicas_E[expert]
    layer.replicas_E[expert] += extra
    change = 1.0 / layer.replicas_E[expert] - 1.0 / before
    for rank in range(layer.arrivals_R.size):
        if layer.held_RE[rank, expert]:
            layer.stale_R[rank] = True
            layer.cross_RE[rank] += change * layer.moment_EE[expert]
