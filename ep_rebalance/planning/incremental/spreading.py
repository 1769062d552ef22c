"""Spreading: mends placements of planners that put two replicas of an expert on one rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled


@compiled
def spread_replicas(
    slots_P: NDArray[np.int64], load_E: NDArray[np.float64], num_ranks: int
) -> None:
    """Leave no rank with two replicas of one expert, in place.

    slots_P: int64 [P]. The expert in each slot.
    load_E: float64 [E], tokens. Load of each expert.

    A second replica is swapped with the expert nearest to it in load per replica, on a rank that lacks
    it. If no swap is possible, its slot goes to the expert with the highest load per replica among
    those that the rank lacks, preferably one that has a slot already.
    """
    slots_per_rank = slots_P.size // num_ranks
    replicas_E = np.bincount(slots_P, minlength=load_E.size)
    # Load per replica; below any load for an expert that has no slot, so that it is chosen last.
    weight_E = np.where(replicas_E > 0, load_E / np.maximum(replicas_E, 1), -1.0)
    for slot in range(slots_P.size):
        rank = slot // slots_per_rank
        first = rank * slots_per_rank
        expert = slots_P[slot]
        if expert not in slots_P[first:slot]:
            continue
        own = slots_P[first : first + slots_per_rank]
        best, best_distance = -1, np.inf
        for other in range(slots_P.size):
            there = other // slots_per_rank * slots_per_rank
            distance = abs(weight_E[slots_P[other]] - weight_E[expert])
            if (
                distance < best_distance
                and slots_P[other] not in own
                and expert not in slots_P[there : there + slots_per_rank]
            ):
                best, best_distance = other, distance
        if best >= 0:
            slots_P[slot], slots_P[best] = slots_P[best], expert
        else:
            slots_P[slot] = _hottest_absent(weight_E, own)


@compiled
def _hottest_absent(weight_E: NDArray[np.float64], own_S: NDArray[np.int64]) -> int:
    """The heaviest expert that is not among `own_S`."""
    hottest = -1
    for expert in range(weight_E.size):
        if expert not in own_S and (hottest < 0 or weight_E[expert] > weight_E[hottest]):
            hottest = expert
    return hottest
