"""Incremental planner: improve the current placement by the few moves that pay best.

The objective is the mean over the window's samples of the squared rank loads, so that experts that
are busy at the same time part ways. Changes are swaps between ranks, and redundant slots given to
another expert. They are made in the order of their gain for each slot that they move, for as long as
that gain is worth a move and the budget lasts. Replicas that keep tokens on their node gain something
more. Many ranks of two slots each have an objective and a search of their own, see
`pairs`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.planning.alignment import align
from ep_rebalance.planning.incremental.descent import improve_layer
from ep_rebalance.planning.incremental.layer import LayerInputs, describe_experts
from ep_rebalance.planning.incremental.load_vectors import load_vectors
from ep_rebalance.planning.incremental.pairs import improve_pairs
from ep_rebalance.planning.problem import Problem

MIN_GAIN_PER_RANK = 1.6e-5
"""The least gain that is worth moving a slot, divided by the number of ranks; in units of the squared
mean rank load. The more ranks there are, the less often a step waits for the one that is relieved.
On 32 ranks, two ranks that swap experts must each come about 2 % of the mean rank load closer to it.
"""

_LEAST_RANKS = 8
"""On fewer ranks than this, a move must gain as much as on this many."""

MANY_PAIRS = 16
"""On this many ranks of two slots, or on more, `improve_pairs` plans. On 8 the descent on squares came out
ahead where load drifts (Mixtral)."""

_MIN_GAIN_OF_PAIRS = 1e-4
"""The least gain that is worth moving a slot there, in mean rank loads of the costliest rank."""

_RECENCY = 2.0
"""Power of the samples' weights there, so that half-lives are shorter: two experts' errors do not average
out as those of many do, and the newest samples tell most about either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Descent:
    """Changes of one layer, in the order in which they must be made; see `improve_layer`."""

    changes_N4: NDArray[np.int64]
    gains_N2: NDArray[np.float64]

    def moved(self, index: int) -> int:
        return int(self.changes_N4[index, 0])

    def gain_per_move(self, index: int) -> float:
        return float(self.gains_N2[index, 1])


def plan_incremental(problem: Problem) -> Placement:
    """The current placement with the best changes in all layers that the budget allows.

    Ties go to the lowest ids whatever the seed. A layer without load stays as it is.
    """
    current, cost_WLE = problem.current, problem.cost.expert_cost_WLE(problem.load)

    def descend(layer: int) -> _Descent:
        return _descend(problem, np.ascontiguousarray(cost_WLE[:, layer]), layer)

    layers = range(current.num_layers)
    if problem.threads > 1:
        with ThreadPoolExecutor(problem.threads) as pool:
            descents = list(pool.map(descend, layers))
    else:
        descents = [descend(layer) for layer in layers]
    slots_LP = current.slots_LP.copy()
    for layer, count in enumerate(_spend(descents, problem.budget.max_moved_slots)):
        _apply(slots_LP[layer], descents[layer].changes_N4[:count])
    aligned_LP = align(slots_LP, current.slots_LP, current.num_ranks)
    return Placement(aligned_LP, current.num_experts, current.num_ranks)


def _descend(problem: Problem, cost_WE: NDArray[np.float64], layer: int) -> _Descent:
    current, budget = problem.current, problem.budget
    slots_P = np.array(current.slots_LP[layer])
    cost = _in_tokens(cost_WE, problem.load.tokens_WLE[:, layer])
    part_EC = even_parts_EC(current)
    # No layer can spend the budget of all, but each may make one swap.
    even_share = max(2, -(-budget.max_moved_slots // current.num_layers))
    if current.slots_per_rank == 2 and current.num_ranks >= MANY_PAIRS:
        changes_N4, gains_N2 = improve_pairs(
            _likely_load_E(cost, problem.load.weight_W, current.num_ranks)[:, None] * part_EC,
            slots_P,
            min(budget.max_moved_slots, 2 * even_share),
            budget.max_arrivals,
            _MIN_GAIN_OF_PAIRS,
        )
    else:
        changes_N4, gains_N2 = improve_layer(
            _inputs(problem, cost, part_EC, slots_P),
            slots_P,
            min(budget.max_moved_slots, even_share),
            budget.max_arrivals,
            MIN_GAIN_PER_RANK * max(current.num_ranks, _LEAST_RANKS),
        )
    return _Descent(changes_N4=changes_N4, gains_N2=gains_N2)


def _inputs(
    problem: Problem,
    cost_WE: NDArray[np.float64],
    part_EC: NDArray[np.float64],
    slots_P: NDArray[np.int32],
) -> LayerInputs:
    topology = problem.topology
    return describe_experts(
        cost_WE,
        problem.load.weight_W,
        part_EC,
        slots_P,
        np.array(topology.node_of_rank, dtype=np.int64),
        topology.internode_price,
        problem.internode_token_price,
    )


def _likely_load_E(
    cost_WE: NDArray[np.float64], weight_W: NDArray[np.float64], num_ranks: int
) -> NDArray[np.float64]:
    """float64 [E], mean rank loads: what an expert's load will hardly exceed, its mean and one standard
    deviation."""
    vectors_EV, own_E = load_vectors(cost_WE, weight_W**_RECENCY, num_ranks)
    likely_E: NDArray[np.float64] = vectors_EV[:, 0] + np.sqrt(
        np.sum(vectors_EV[:, 1:] ** 2, axis=1) + own_E
    )
    return likely_E


def even_parts_EC(placement: Placement) -> NDArray[np.float64]:
    """float64 [E, max_replicas + 2], the share of an expert's cost that each of its replicas bears."""
    # part[e, c] = 1 / c
    part_C = np.append(0.0, 1.0 / np.arange(1, placement.max_replicas + 2))
    return np.tile(part_C, (placement.num_experts, 1))


def _in_tokens(cost_WE: NDArray[np.float64], tokens_WE: NDArray[np.float64]) -> NDArray[np.float64]:
    """The costs, scaled so that they sum to the tokens, because their noise is taken to be that of
    counts.
    """
    total = cost_WE.sum()
    return cost_WE * (tokens_WE.sum() / total) if total > 0.0 else cost_WE


def _spend(descents: Sequence[_Descent], max_moved: int) -> list[int]:
    """How many changes to make in each layer.

    The best next change of all layers is made until none is left. A layer ends with the first of its
    changes that the rest of the budget does not cover.
    """
    taken = [0] * len(descents)
    left = max_moved
    waiting = [
        (-d.gain_per_move(0), layer) for layer, d in enumerate(descents) if len(d.changes_N4)
    ]
    heapq.heapify(waiting)
    while waiting:
        _, layer = heapq.heappop(waiting)
        descent = descents[layer]
        moved = descent.moved(taken[layer])
        if moved > left:
            continue
        left -= moved
        taken[layer] += 1
        if taken[layer] < len(descent.changes_N4):
            heapq.heappush(waiting, (-descent.gain_per_move(taken[layer]), layer))
    return taken


def _apply(slots_P: NDArray[np.int32], changes_N4: NDArray[np.int64]) -> None:
    for _, slot, other, expert in changes_N4.tolist():
        if other >= 0:
            slots_P[other] = slots_P[slot]
        slots_P[slot] = expert
