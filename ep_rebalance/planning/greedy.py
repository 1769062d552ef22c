"""Greedy planner: the published DeepSeek EPLB algorithm, global variant
(github.com/deepseek-ai/EPLB).

Copies go one by one to the expert with the highest load per replica. Replicas are then packed,
heaviest first, onto the rank with the lowest load that has a slot free. Unlike the published code,
no rank gets an expert twice: such a rank is passed over, or swaps an expert with one that may take
it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.placement import Placement
from ep_rebalance.planning.alignment import align
from ep_rebalance.planning.problem import Problem


def plan_greedy(problem: Problem) -> Placement:
    """A placement made from scratch from the total load, then aligned with the current one.

    It serves as a baseline, so it ignores the budget: it may change every slot, and the staging
    memory must hold all slots of a rank. It also ignores topology and cost model, and ties go to
    the lowest id whatever the seed. A layer without load stays as it is.
    """
    current, load_LE = problem.current, problem.load.load_LE
    slots_LP = current.slots_LP.copy()
    for layer in np.flatnonzero(load_LE.sum(axis=1)):
        replicas_E = _replica_counts(load_LE[layer], current.num_slots, current.max_replicas)
        weight_E = load_LE[layer] / replicas_E
        heaviest_E = np.argsort(-weight_E, kind="stable")
        experts_RS = _pack(weight_E, replicas_E, heaviest_E, current.num_ranks)
        slots_LP[layer] = experts_RS.reshape(-1)
    aligned_LP = align(slots_LP, current.slots_LP, current.num_ranks)
    return Placement(aligned_LP, current.num_experts, current.num_ranks)


@compiled
def _replica_counts(load_E: NDArray[np.float64], num_slots: int, most: int) -> NDArray[np.int64]:
    """int64 [E], replicas that sum to `num_slots`, from 1 to `most` each."""
    replicas_E = np.ones(load_E.size, np.int64)
    for _ in range(num_slots - load_E.size):
        hottest = -1
        for expert in range(load_E.size):
            # load / replicas > load[hottest] / replicas[hottest], without the divisions
            if replicas_E[expert] < most and (
                hottest < 0
                or load_E[expert] * replicas_E[hottest] > load_E[hottest] * replicas_E[expert]
            ):
                hottest = expert
        replicas_E[hottest] += 1
    return replicas_E


@compiled
def _pack(
    weight_E: NDArray[np.float64],
    replicas_E: NDArray[np.int64],
    heaviest_E: NDArray[np.int64],
    num_ranks: int,
) -> NDArray[np.int32]:
    """int32 [R, S], the experts on each rank.

    weight_E: float64 [E], tokens. Load of one replica of each expert.
    heaviest_E: int64 [E]. The experts by weight, heaviest first.
    """
    slots_per_rank = replicas_E.sum() // num_ranks
    experts_RS = np.full((num_ranks, slots_per_rank), -1, np.int32)
    filled_R = np.zeros(num_ranks, np.int64)
    load_R = np.zeros(num_ranks)
    for expert in heaviest_E:
        for _ in range(replicas_E[expert]):
            rank = _lightest_rank(experts_RS, filled_R, load_R, expert)
            if rank < 0:
                rank = _make_room(experts_RS, filled_R, load_R, weight_E, expert)
            experts_RS[rank, filled_R[rank]] = expert
            filled_R[rank] += 1
            load_R[rank] += weight_E[expert]
    return experts_RS


@compiled
def _lightest_rank(
    experts_RS: NDArray[np.int32],
    filled_R: NDArray[np.int64],
    load_R: NDArray[np.float64],
    expert: int,
) -> int:
    """The least loaded rank that has a free slot and lacks this expert; -1 if there is none."""
    lightest = -1
    for rank in range(load_R.size):
        if filled_R[rank] == experts_RS.shape[1] or expert in experts_RS[rank]:
            continue
        if lightest < 0 or load_R[rank] < load_R[lightest]:
            lightest = rank
    return lightest


@compiled
def _make_room(
    experts_RS: NDArray[np.int32],
    filled_R: NDArray[np.int64],
    load_R: NDArray[np.float64],
    weight_E: NDArray[np.float64],
    expert: int,
) -> int:
    """Free a slot on a rank that lacks `expert`, and return that rank.

    It is called when every rank with a free slot holds `expert`. A full rank that lacks it has S
    experts; the rank with the free slot has at most S - 1, one of which is `expert`. So at least two
    of those S can go there, and the one nearest in load does.
    """
    free = np.argmax(filled_R < experts_RS.shape[1])
    best_rank, best_slot, best_distance = -1, -1, np.inf
    for rank in range(load_R.size):
        if expert in experts_RS[rank]:
            continue
        for slot in range(experts_RS.shape[1]):
            moved = experts_RS[rank, slot]
            distance = abs(weight_E[moved] - weight_E[expert])
            if moved not in experts_RS[free] and distance < best_distance:
                best_rank, best_slot, best_distance = rank, slot, distance
    moved = experts_RS[best_rank, best_slot]
    experts_RS[free, filled_R[free]] = moved
    filled_R[free] += 1
    load_R[free] += weight_E[moved]
    filled_R[best_rank] -= 1
    experts_RS[best_rank, best_slot] = experts_RS[best_rank, filled_R[best_rank]]
    experts_RS[best_rank, filled_R[best_rank]] = -1
    load_R[best_rank] -= weight_E[moved]
    return best_rank
