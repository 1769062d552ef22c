"""Incremental planner: improve the current placement by the few moves that pay best.

The objective is the mean over the window's snapshots of the squared rank loads, so that experts
which are busy at the same time part ways. Swaps between ranks, and redundant slots given to another
expert, are taken in the order of their gain for each slot that they move, as long as that gain is
worth a move and the budget lasts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.planning.alignment import align
from ep_rebalance.planning.descent import improve_layer
from ep_rebalance.planning.plan import Budget
from ep_rebalance.planning.second_moment import second_moment_EE
from ep_rebalance.topology import Topology

MIN_GAIN_PER_MOVED_SLOT = 4e-4
"""Least gain that is worth a moved slot, in units of the mean square load of an even rank: two
ranks that swap experts must each come about 2 % of the mean rank load closer to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Descent:
    """Changes of one layer in the order in which they must be made, as `improve_layer` returns
    them."""

    changes_N4: NDArray[np.int64]
    gains_N: NDArray[np.float64]

    def moved(self, index: int) -> int:
        return int(self.changes_N4[index, 0])

    def gain_per_move(self, index: int) -> float:
        return float(self.gains_N[index]) / max(self.moved(index), 1)


def plan_incremental(
    samples_WLE: NDArray[np.float64],
    current: Placement,
    topology: Topology,
    budget: Budget,
    seed: int,
) -> Placement:
    """The current placement with the best changes that the budget allows, over all layers.

    Topology is not looked at, and ties go to the lowest ids whatever the seed. A layer without load
    stays.
    """
    descents = [
        _descend(samples_WLE[:, layer], current.slots_LP[layer], current.num_ranks, budget)
        for layer in range(current.num_layers)
    ]
    slots_LP = current.slots_LP.copy()
    for layer, count in enumerate(_spend(descents, budget.max_moved_slots)):
        _apply(slots_LP[layer], descents[layer].changes_N4[:count])
    aligned_LP = align(slots_LP, current.slots_LP, current.num_ranks)
    return Placement(aligned_LP, current.num_experts, current.num_ranks)


def _descend(
    samples_WE: NDArray[np.float64], slots_P: NDArray[np.int32], num_ranks: int, budget: Budget
) -> _Descent:
    if not samples_WE.any():
        return _Descent(changes_N4=np.empty((0, 4), dtype=np.int64), gains_N=np.empty(0))
    changes_N4, gains_N = improve_layer(
        second_moment_EE(samples_WE, num_ranks),
        np.array(slots_P),
        num_ranks,
        budget.max_moved_slots,
        budget.max_arrivals,
        MIN_GAIN_PER_MOVED_SLOT,
    )
    return _Descent(changes_N4=changes_N4, gains_N=gains_N)


def _spend(descents: Sequence[_Descent], max_moved: int) -> list[int]:
    """How many changes of each layer to make: always the best next one, until one does not fit the
    budget."""
    taken = [0] * len(descents)
    left = max_moved
    waiting = [(-d.gain_per_move(0), layer) for layer, d in enumerate(descents) if d.gains_N.size]
    heapq.heapify(waiting)
    while waiting:
        _, layer = heapq.heappop(waiting)
        descent = descents[layer]
        moved = descent.moved(taken[layer])
        if moved > left:
            continue
        left -= moved
        taken[layer] += 1
        if taken[layer] < descent.gains_N.size:
            heapq.heappush(waiting, (-descent.gain_per_move(taken[layer]), layer))
    return taken


def _apply(slots_P: NDArray[np.int32], changes_N4: NDArray[np.int64]) -> None:
    for _, slot, other, expert in changes_N4.tolist():
        if other >= 0:
            slots_P[other] = slots_P[slot]
        slots_P[slot] = expert
