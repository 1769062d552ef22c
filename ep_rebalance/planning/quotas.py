"""Quotas: how the tokens of an expert are split over its replicas.

The split that keeps the busiest rank lowest is the optimum of a linear programme. It is reached by
pouring the load of each replicated expert in turn over its ranks, like water, until nothing
changes: each pour minimises the sum of squared rank loads over one expert's quotas, and the split
with the least squares also has the lowest maximum. Most replicated experts have two replicas; these
are poured a little beyond the level, until changes are small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.kernels.shared_arithmetic import MOST_SWEEPS
from ep_rebalance.placement import Placement

_MAX_SWEEPS = 200
_TOLERANCE = 1e-4
"""Pouring ends when no rank load changes by more than this part of the mean in one sweep."""
_OWN_TOLERANCE = 1e-2
"""The same where a step's own load is poured: about a token, of which a rank gets a hundred at most sizes."""
_BEYOND = 1.5
"""Successive over-relaxation: long chains of ranks, each of which shares an expert with the next,
level out several times as fast."""


def split_quotas(
    placement: Placement, load_LE: NDArray[np.floating | np.integer]
) -> NDArray[np.float64]:
    """float64 [L, P], the split of each expert's tokens that keeps the busiest rank lowest.

    load_LE: [L, E], tokens. An expert without any is split evenly.

    The quotas of an expert's slots sum to 1.
    """
    quotas_LP = placement.even_quotas_LP()
    if placement.num_redundant:
        load = np.array(load_LE, dtype=np.float64)
        _pour_layers(load, np.array(placement.slots_LP), placement.first_slots_R1, quotas_LP)
    return quotas_LP


def split_by_own_counts(
    placement: Placement,
    load_LE: NDArray[np.floating | np.integer],
    quotas_LP: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [L, P], the split of a load that is counted before it is sent, from the quotas of the window.

    load_LE: [L, E], tokens.
    """
    load = np.array(load_LE, dtype=np.float64)
    own_LP = np.array(quotas_LP, dtype=np.float64)
    if placement.num_redundant:
        first_R1 = placement.first_slots_R1
        for load_E, slots_P, own_P in zip(load, np.array(placement.slots_LP), own_LP, strict=True):
            pour_step(load_E, slots_P, first_R1, own_P)
    return own_LP


@compiled
def _pour_layers(
    load_LE: NDArray[np.float64],
    slots_LP: NDArray[np.int32],
    first_R1: NDArray[np.int64],
    quotas_LP: NDArray[np.float64],
) -> None:
    for layer in range(slots_LP.shape[0]):
        _pour_layer(load_LE[layer], slots_LP[layer], first_R1, quotas_LP[layer])


@compiled
def _pour_layer(
    load_E: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    first_R1: NDArray[np.int64],
    quotas_P: NDArray[np.float64],
) -> None:
    """Improve `quotas_P` in place: split one expert at a time anew while the others stay."""
    num_ranks = first_R1.size - 1
    slots_per_rank = first_R1[1]  # of all ranks, or no expert has a second slot
    rank_load_R = np.empty(num_ranks)
    sum_ranks(load_E, slots_P, quotas_P, first_R1, rank_load_R)
    replicated, slots, first = _replicated(load_E, slots_P)
    smallest_change = _TOLERANCE * rank_load_R.sum() / num_ranks
    for _ in range(_MAX_SWEEPS):
        change = _sweep(
            load_E, replicated, slots, first, slots_per_rank, _BEYOND, rank_load_R, quotas_P
        )
        if change <= smallest_change:
            break
    # Over-relaxed pairs are a little off their level; a plain sweep puts them on it.
    _sweep(load_E, replicated, slots, first, slots_per_rank, 1.0, rank_load_R, quotas_P)


@compiled
def pour_step(
    load_E: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    first_R1: NDArray[np.int64],
    quotas_P: NDArray[np.float64],
) -> None:
    """Improve one layer's quotas in place, for a load of which nothing else is known; in microseconds.

    load_E: tokens. first_R1: `Placement.first_slots_R1`. quotas_P: those to begin with.
    """
    num_ranks = first_R1.size - 1
    slots_per_rank = first_R1[1]
    rank_load_R = np.empty(num_ranks)
    sum_ranks(load_E, slots_P, quotas_P, first_R1, rank_load_R)
    replicated, slots, first = _replicated(load_E, slots_P)
    smallest_change = _OWN_TOLERANCE * rank_load_R.sum() / num_ranks
    for _ in range(MOST_SWEEPS):
        change = _sweep(
            load_E, replicated, slots, first, slots_per_rank, 1.0, rank_load_R, quotas_P
        )
        if change <= smallest_change:
            break


@compiled
def sum_ranks(
    load_E: NDArray[np.float64] | NDArray[np.int64],
    slots_P: NDArray[np.int32] | NDArray[np.uint32],
    quotas_P: NDArray[np.float64],
    first_R1: NDArray[np.int64],
    load_R: NDArray[np.float64],
) -> None:
    """Fill `load_R` with what each rank gets of one layer's tokens."""
    # load_R[r] = sum over the slots p of rank r of load_E[slots_P[p]] * quotas_P[p]
    for rank in range(len(load_R)):
        tokens = 0.0
        for slot in range(first_R1[rank], first_R1[rank + 1]):
            tokens += load_E[slots_P[slot]] * quotas_P[slot]
        load_R[rank] = tokens


@compiled
def _sweep(
    load_E: NDArray[np.float64],
    replicated: NDArray[np.int64],
    slots: NDArray[np.int64],
    first: NDArray[np.int64],
    slots_per_rank: int,
    beyond: float,
    rank_load_R: NDArray[np.float64],
    quotas_P: NDArray[np.float64],
) -> float:
    """Split each expert anew; returns the largest change of a rank's load.

    replicated, slots, first: as returned by `_replicated`.
    beyond: how far an expert with two replicas is poured, as a multiple of the way to its level.
    """
    change = 0.0
    for index in range(replicated.size):
        begin, end, load = first[index], first[index + 1], load_E[replicated[index]]
        if end - begin == 2:
            one, other = slots[begin], slots[begin + 1]
            here, there = one // slots_per_rank, other // slots_per_rank
            # here + x = there - x where both ranks are level: x = (there - here) / 2
            poured = load * quotas_P[one]
            level = poured + 0.5 * beyond * (rank_load_R[there] - rank_load_R[here])
            level = min(max(level, 0.0), load)
            quotas_P[one], quotas_P[other] = level / load, 1.0 - level / load
            rank_load_R[here] += level - poured
            rank_load_R[there] -= level - poured
            change = max(change, abs(level - poured))
            continue
        # The floor of a rank is its load without this expert.
        floors = np.empty(end - begin)
        for j in range(begin, end):
            floors[j - begin] = rank_load_R[slots[j] // slots_per_rank] - load * quotas_P[slots[j]]
        level = _water_level(floors, load)
        for j in range(begin, end):
            rank, floor = slots[j] // slots_per_rank, floors[j - begin]
            poured = max(level - floor, 0.0)
            change = max(change, abs(floor + poured - rank_load_R[rank]))
            quotas_P[slots[j]] = poured / load
            rank_load_R[rank] = floor + poured
    return change


@compiled
def _replicated(
    load_E: NDArray[np.float64], slots_P: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The experts that have both load and several replicas; their slots, expert by expert; and where
    the slots of each begin, with their total at the end.
    """
    replicas_E = np.zeros(load_E.size, np.int64)
    for expert in slots_P:
        replicas_E[expert] += 1
    first_E = np.full(load_E.size, -1)
    experts, first = np.empty(load_E.size, np.int64), np.zeros(load_E.size + 1, np.int64)
    count = 0
    for expert in range(load_E.size):
        if replicas_E[expert] > 1 and load_E[expert] > 0.0:
            experts[count], first_E[expert] = expert, first[count]
            first[count + 1] = first[count] + replicas_E[expert]
            count += 1
    slots = np.empty(first[count], np.int64)
    for slot in range(slots_P.size):
        expert = slots_P[slot]
        if first_E[expert] >= 0:
            slots[first_E[expert]] = slot
            first_E[expert] += 1
    return experts[:count], slots, first[: count + 1]


@compiled
def _water_level(floors: NDArray[np.float64], volume: float) -> float:
    """The level at which `volume` settles over `floors`: sum of max(level - floor, 0) = volume."""
    # Over n wet floors the level is (volume + their sum) / n. It begins with all floors wet; leaving
    # out those that are above the level lowers it further.
    level = np.inf
    while True:
        wet, total = 0, volume
        for floor in floors:
            if floor < level:
                wet += 1
                total += floor
        lowered = total / wet
        if lowered >= level:
            return level
        level = lowered
