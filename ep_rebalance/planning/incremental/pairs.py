"""Pairs: the planner's way with layers of many ranks that hold two slots each.

A rank of two slots is as loaded as its heavier expert wants, and only a light one beside it helps. The
descent on squares ends early there: neither one more replica of a hot expert nor the swap that gives the new
replica a light neighbour pays alone. So replicas are counted anew first, as DeepSeek's EPLB counts them but
from the counts that there are; then ranks swap experts, the costliest first. What a step waits for is the
costliest rank, and load to come is a little uncertain, so the objective is a soft maximum,

    log(sum over ranks of exp(SHARPNESS l_r)) / SHARPNESS

with l_r the load of a rank in units of the mean. Changes that pay only together are reported as equally good
each, so that whoever spends a budget takes all of them or none.

Topology is not looked at: on so many ranks most experts come from other nodes anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled

SHARPNESS = 30.0
"""Of the soft maximum. A thirtieth of the mean load is about what the sample of tokens that a step is changes
a rank's load by."""

_TRIED_IN_VAIN = 3
"""As in `descent`: once this many ranks in a row could not be relieved, the layer is done."""


class Pairs(NamedTuple):
    """A layer while it is improved; changed in place.

    replica_load_EC: float64 [E, max_replicas + 2], mean rank loads. Of one replica, by their number.
    slots_P: int64 [P]. The expert in each slot; slots 2r and 2r + 1 are those of rank r.
    replicas_E: int64 [E]. How many slots hold each expert.
    held_RE, before_RE: bool [R, E]. Whether the rank holds the expert; and before any change.
    load_R: float64 [R], mean rank loads.
    tried_R: float64 [R]. The rank's load when relieving it last failed; 0 before.
    """

    replica_load_EC: NDArray[np.float64]
    slots_P: NDArray[np.int64]
    replicas_E: NDArray[np.int64]
    held_RE: NDArray[np.bool_]
    before_RE: NDArray[np.bool_]
    load_R: NDArray[np.float64]
    tried_R: NDArray[np.float64]


@compiled
def improve_pairs(
    replica_load_EC: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    max_moved: int,
    max_arrivals: int,
    least_gain_per_move: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The changes that improve a layer, each on top of those before it.

    replica_load_EC: as in `Pairs`. slots_P: int32 [P]. The expert in each slot, no rank has one twice.
    max_moved: slots. Bound on all changes together.
    max_arrivals: experts. Bound on what arrives on one rank.
    least_gain_per_move: mean rank loads, of the soft maximum.

    Returns int64 [N, 4] and float64 [N, 2] for N changes, as `improve_layer` does.
    """
    pairs = _start(replica_load_EC, slots_P)
    limit = 4 * slots_P.size
    changes_N4, gains_N2 = np.empty((limit, 4), np.int64), np.zeros((limit, 2))
    copying, moved, before = True, 0, soft_maximum(pairs.load_R)
    count = 0
    while count < limit:
        slot, other, expert = -1, -1, -1
        if copying:
            slot, expert = _next_copy(pairs, max_moved - moved, max_arrivals)
            copying = slot >= 0
        if not copying:
            slot, other = _next_swap(pairs, max_moved - moved, max_arrivals, least_gain_per_move)
            if slot < 0:
                break
            expert = pairs.slots_P[other]
        changed = _apply(pairs, slot, other, expert)
        after = soft_maximum(pairs.load_R)
        changes_N4[count] = (changed, slot, other, expert)
        gains_N2[count, 0] = before - after
        moved, before = moved + changed, after
        count += 1
    kept = _pool(changes_N4[:count], gains_N2[:count], least_gain_per_move)
    return changes_N4[:kept], gains_N2[:kept]


@compiled
def soft_maximum(load_R: NDArray[np.float64]) -> float:
    """In units of the loads."""
    top = load_R.max()
    total: float = np.sum(np.exp(SHARPNESS * (load_R - top)))
    soft: float = top + np.log(total) / SHARPNESS
    return soft


@compiled
def _start(replica_load_EC: NDArray[np.float64], slots_P: NDArray[np.int32]) -> Pairs:
    num_experts, num_ranks = replica_load_EC.shape[0], slots_P.size // 2
    held_RE = np.zeros((num_ranks, num_experts), np.bool_)
    replicas_E = np.zeros(num_experts, np.int64)
    for slot in range(slots_P.size):
        held_RE[slot // 2, slots_P[slot]] = True
        replicas_E[slots_P[slot]] += 1
    pairs = Pairs(
        replica_load_EC,
        slots_P.astype(np.int64),
        replicas_E,
        held_RE,
        held_RE.copy(),
        np.zeros(num_ranks),
        np.zeros(num_ranks),
    )
    _sum_loads(pairs)
    return pairs


@compiled
def _sum_loads(pairs: Pairs) -> None:
    for rank in range(pairs.load_R.size):
        pairs.load_R[rank] = _slot_load(pairs, 2 * rank) + _slot_load(pairs, 2 * rank + 1)


@compiled
def _slot_load(pairs: Pairs, slot: int) -> float:
    expert = pairs.slots_P[slot]
    load: float = pairs.replica_load_EC[expert, pairs.replicas_E[expert]]
    return load


@compiled
def _next_copy(pairs: Pairs, left: int, max_arrivals: int) -> tuple[int, int]:
    """(slot, expert): one more replica for the expert with the heaviest ones; the slot is -1 if no expert
    can spare one that is lighter even after it has.

    Of the slots of that expert the one with the lightest neighbour is taken.
    """
    load_EC, replicas_E, most = pairs.replica_load_EC, pairs.replicas_E, pairs.load_R.size
    heaviest, spare = -1, -1
    for expert in range(replicas_E.size):
        own = load_EC[expert, replicas_E[expert]]
        if replicas_E[expert] < min(most, load_EC.shape[1] - 2) and (
            heaviest < 0 or own > load_EC[heaviest, replicas_E[heaviest]]
        ):
            heaviest = expert
        if replicas_E[expert] > 1 and (
            spare < 0
            or load_EC[expert, replicas_E[expert] - 1] < load_EC[spare, replicas_E[spare] - 1]
        ):
            spare = expert
    best = -1
    if heaviest >= 0 and spare >= 0:
        own = load_EC[heaviest, replicas_E[heaviest]]
        if own > load_EC[spare, replicas_E[spare] - 1]:
            for slot in range(pairs.slots_P.size):
                if (
                    pairs.slots_P[slot] == spare
                    and _may_change(pairs, slot, heaviest, left, max_arrivals)
                    and (best < 0 or _slot_load(pairs, slot ^ 1) < _slot_load(pairs, best ^ 1))
                ):
                    best = slot
    return best, heaviest


@compiled
def _may_change(pairs: Pairs, slot: int, expert: int, left: int, max_arrivals: int) -> bool:
    rank = slot // 2
    moved = _moved_by(pairs, rank, expert, pairs.slots_P[slot])
    allowed: bool = (
        not pairs.held_RE[rank, expert]
        and moved <= left
        and _arrivals(pairs, rank) + moved <= max_arrivals
    )
    return allowed


@compiled
def _arrivals(pairs: Pairs, rank: int) -> int:
    first, second = pairs.slots_P[2 * rank], pairs.slots_P[2 * rank + 1]
    return int(not pairs.before_RE[rank, first]) + int(not pairs.before_RE[rank, second])


@compiled
def _moved_by(pairs: Pairs, rank: int, arrives: int, leaves: int) -> int:
    """By how much the slots of `rank` grow in number that differ from the layer before any change."""
    return int(pairs.before_RE[rank, leaves]) - int(pairs.before_RE[rank, arrives])


@compiled
def _next_swap(
    pairs: Pairs, left: int, max_arrivals: int, least_gain_per_move: float
) -> tuple[int, int]:
    """The two slots whose swap gains most per move for the costliest rank that can be relieved; -1 if there
    is none.
    """
    slots_P, load_R = pairs.slots_P, pairs.load_R
    weight_R = np.exp(SHARPNESS * (load_R - load_R.max()))
    weight_R /= weight_R.sum()
    for _ in range(_TRIED_IN_VAIN):
        here = _costliest(pairs)
        if here < 0:
            break
        best_slot, best_other, best = -1, -1, least_gain_per_move
        for slot in range(2 * here, 2 * here + 2):
            factor_E = _factors(pairs, slot)
            least = _least(best)
            for other in range(slots_P.size):
                # By how much the sum of exp(SHARPNESS l_r), of which weights are parts, would shrink. It
                # calls nothing: handing over arrays takes longer than the arithmetic.
                factor, there = factor_E[slots_P[other]], other // 2
                if factor >= 1.0 or load_R[there] >= load_R[here]:
                    continue
                # Where an expert is so heavy that the exponential is 0, the other rank would come to bear
                # what this one does, and little would be gained.
                if factor == 0.0:
                    continue
                less = weight_R[here] * (1.0 - factor) - weight_R[there] * (1.0 / factor - 1.0)
                if not less >= least:
                    continue
                gain = -np.log(max(1.0 - less, 1e-12)) / SHARPNESS
                if gain > best:
                    moved = _swap_moves(pairs, slot, other, left, max_arrivals)
                    if moved >= -2 and gain > best * max(moved, 1):
                        best_slot, best_other, best = slot, other, gain / max(moved, 1)
                        least = _least(best)
        if best_slot >= 0:
            return best_slot, best_other
        pairs.tried_R[here] = pairs.load_R[here]
    return -1, -1


@compiled
def _factors(pairs: Pairs, slot: int) -> NDArray[np.float64]:
    """float64 [E], what exp(SHARPNESS l_r) of the rank of `slot` is multiplied by if this expert takes the
    place of the one there; 1 or more if it is no lighter.
    """
    factor_E = np.empty(pairs.replicas_E.size)
    for expert in range(factor_E.size):
        load = pairs.replica_load_EC[expert, pairs.replicas_E[expert]]
        factor_E[expert] = np.exp(-SHARPNESS * (_slot_load(pairs, slot) - load))
    return factor_E


@compiled
def _least(gain: float) -> float:
    """The part by which the sum of exponentials must at least shrink for a gain of more than this: logarithms
    take long, so few are taken.
    """
    least: float = -np.expm1(-SHARPNESS * gain) * (1.0 - 1e-9)
    return least


@compiled
def _costliest(pairs: Pairs) -> int:
    """The costliest rank whose load has grown since relieving it last failed; -1 if there is none."""
    costliest = -1
    for rank in range(pairs.load_R.size):
        if pairs.load_R[rank] > pairs.tried_R[rank] and (
            costliest < 0 or pairs.load_R[rank] > pairs.load_R[costliest]
        ):
            costliest = rank
    return costliest


@compiled
def _swap_moves(pairs: Pairs, slot: int, other: int, left: int, max_arrivals: int) -> int:
    """By how many slots more the layer then differs from what it was; -3 if the swap is not allowed."""
    here, there = slot // 2, other // 2
    a, b = pairs.slots_P[slot], pairs.slots_P[other]
    if pairs.held_RE[there, a] or pairs.held_RE[here, b]:
        return -3
    moved_here, moved_there = _moved_by(pairs, here, b, a), _moved_by(pairs, there, a, b)
    if (
        moved_here + moved_there > left
        or _arrivals(pairs, here) + moved_here > max_arrivals
        or _arrivals(pairs, there) + moved_there > max_arrivals
    ):
        return -3
    return moved_here + moved_there


@compiled
def _apply(pairs: Pairs, slot: int, other: int, expert: int) -> int:
    """Make the change, and return by how many slots more the layer then differs from what it was."""
    leaves = pairs.slots_P[slot]
    moved = _moved_by(pairs, slot // 2, expert, leaves)
    _replace(pairs, slot, expert)
    if other >= 0:
        moved += _moved_by(pairs, other // 2, leaves, expert)
        _replace(pairs, other, leaves)
    _sum_loads(pairs)
    return moved


@compiled
def _replace(pairs: Pairs, slot: int, expert: int) -> None:
    leaves = pairs.slots_P[slot]
    pairs.held_RE[slot // 2, leaves] = False
    pairs.held_RE[slot // 2, expert] = True
    pairs.replicas_E[leaves] -= 1
    pairs.replicas_E[expert] += 1
    pairs.slots_P[slot] = expert


@compiled
def _pool(
    changes_N4: NDArray[np.int64], gains_N2: NDArray[np.float64], least_gain_per_move: float
) -> int:
    """Set the gains per move so that they never rise, and return how many changes are worth their moves.

    Neighbours whose gain per move would rise get that of all of them together (the pool-adjacent-violators
    algorithm of isotonic regression).
    """
    ends = np.zeros(len(changes_N4) + 1, np.int64)
    gains, moves = np.zeros(ends.size), np.zeros(ends.size)
    pools = 0
    for index in range(len(changes_N4)):
        pools += 1
        ends[pools] = index + 1
        gains[pools], moves[pools] = gains_N2[index, 0], changes_N4[index, 0]
        while pools > 1 and _rate(gains, moves, pools) >= _rate(gains, moves, pools - 1):
            gains[pools - 1] += gains[pools]
            moves[pools - 1] += moves[pools]
            ends[pools - 1] = ends[pools]
            pools -= 1
    for pool in range(1, pools + 1):
        rate = _rate(gains, moves, pool)
        if rate <= least_gain_per_move:
            return int(ends[pool - 1])
        gains_N2[ends[pool - 1] : ends[pool], 1] = rate
    return len(changes_N4)


@compiled
def _rate(gains: NDArray[np.float64], moves: NDArray[np.float64], pool: int) -> float:
    rate: float = gains[pool] / max(moves[pool], 1.0)
    return rate
