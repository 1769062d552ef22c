"""The order in which experts with replicas are poured, the ground under them, and the pour itself compiled
for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.kernels.shared_arithmetic import (
    HASH_STEP,
    IGNORED,
    MOST_REPLICAS,
    MOST_SWEEPS,
    RANKS_PER_PAIR,
    UNIT_BITS,
    Ranks,
)


class HostTables(NamedTuple):
    """One layer's tables for the host.

    slots_EC, thresholds_EC: int32 [E, C]. See `LayerTables`.
    poured_X, row_E, ground_R: int32 [X], [E] and [R]. See `PourTables`. X is 0 where experts go by quotas.
    """

    slots_EC: NDArray[np.int32]
    thresholds_EC: NDArray[np.int32]
    poured_X: NDArray[np.int32]
    row_E: NDArray[np.int32]
    ground_R: NDArray[np.int32]


_NEARNESS = 0.75
"""The part of what a source would keep near by its quotas that it tries to keep near when it pours.

At 1 a source has nothing left to send home when the others need it to; at three quarters nearly all of both
is had (benchmarks/own_counts.py).
"""


def pour_order(
    slots_LEC: NDArray[np.int32], *, rows: int, slots_per_rank: int, num_ranks: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """(poured, colour, row) of each layer, as in `PourTables`: int32 [L, X], [L, X] and [L, E].

    Greedy colouring, experts with most replicas first: each gets the first colour that none of its ranks
    has yet.

    slots_LEC: int32 [L, E, C]. As from `dispatch_thresholds`.
    rows: X, at least as many as there may be experts with replicas; 0 for experts that all go by quotas.
    """
    layers, experts, _ = slots_LEC.shape
    poured_LX = np.full((layers, rows), -1, dtype=np.int32)
    colour_LX = np.full((layers, rows), -1, dtype=np.int32)
    row_LE = np.full((layers, experts), -1, dtype=np.int32)
    if rows:
        _order_layers(slots_LEC, slots_per_rank, num_ranks, poured_LX, colour_LX, row_LE)
    return poured_LX, colour_LX, row_LE


@compiled
def _order_layers(
    slots_LEC: NDArray[np.int32],
    slots_per_rank: int,
    num_ranks: int,
    poured_LX: NDArray[np.int32],
    colour_LX: NDArray[np.int32],
    row_LE: NDArray[np.int32],
) -> None:
    for layer in range(slots_LEC.shape[0]):
        replicas_E = (slots_LEC[layer] >= 0).sum(axis=1)
        colour_E = _colours(slots_LEC[layer], replicas_E, slots_per_rank, num_ranks)
        row = 0
        for colour in range(colour_E.max() + 1):
            for expert in range(colour_E.size):
                if colour_E[expert] == colour:
                    poured_LX[layer, row], colour_LX[layer, row] = expert, colour
                    row_LE[layer, expert] = row
                    row += 1


@compiled
def _colours(
    slots_EC: NDArray[np.int32],
    replicas_E: NDArray[np.int64],
    slots_per_rank: int,
    num_ranks: int,
) -> NDArray[np.int64]:
    """int64 [E]; -1 for experts that are not poured."""
    colour_E = np.full(replicas_E.size, -1)
    taken_RN = np.zeros((num_ranks, replicas_E.size), np.bool_)  # by rank and colour
    for expert in np.argsort(-replicas_E, kind="mergesort"):
        if not 2 <= replicas_E[expert] <= MOST_REPLICAS:
            continue
        ranks = slots_EC[expert, : replicas_E[expert]] // slots_per_rank
        colour = 0
        while taken_RN[ranks, colour].any():
            colour += 1
        taken_RN[ranks, colour] = True
        colour_E[expert] = colour
    return colour_E


def ground_of_ranks(
    slots_LEC: NDArray[np.int32],
    thresholds_LEC: NDArray[np.int32],
    quotas_LP: NDArray[np.float64],
    load_LE: NDArray[np.float64] | None,
    num_ranks: int,
) -> NDArray[np.int32]:
    """int32 [L, R]: `PourTables.ground_R` of each layer, so that a source's tokens stay near.

    By the thresholds of a source, ranks near it get more of its tokens than their quotas say, and others
    less. These differences cancel out over all sources, so that ranks are as level with them as without.

    slots_LEC, thresholds_LEC: int32 [L, E, C]. As from `dispatch_thresholds`.
    quotas_LP: float64 [L, P]. What they were made from.
    load_LE: float64 [L, E]. The tokens that the quotas were fitted to; if None, the ground is level.
    """
    ground_LR = np.zeros((len(slots_LEC), num_ranks), dtype=np.int32)
    if load_LE is None:
        return ground_LR
    slots_per_rank = quotas_LP.shape[1] // num_ranks
    for layer, tokens_E in enumerate(load_LE):
        if tokens_E.any():
            _set_ground(
                slots_LEC[layer],
                thresholds_LEC[layer],
                quotas_LP[layer],
                tokens_E / tokens_E.sum(),
                slots_per_rank,
                ground_LR[layer],
            )
    return ground_LR


@compiled
def _set_ground(
    slots_EC: NDArray[np.int32],
    thresholds_EC: NDArray[np.int32],
    quotas_P: NDArray[np.float64],
    share_E: NDArray[np.float64],
    slots_per_rank: int,
    ground_R: NDArray[np.int32],
) -> None:
    # near[r] = sum over the replicas (e, j) on rank r of share[e] (part at this source - quota)
    near_R = np.zeros(ground_R.size)
    for expert in range(share_E.size):
        lower = 0.0
        for j in range(slots_EC.shape[1]):
            slot = slots_EC[expert, j]
            if slot < 0:
                break
            upper = thresholds_EC[expert, j] / 65536
            near_R[slot // slots_per_rank] += share_E[expert] * (upper - lower - quotas_P[slot])
            lower = upper
    highest = near_R.max()
    for rank in range(ground_R.size):
        ground_R[rank] = np.rint(65536 * _NEARNESS * (highest - near_R[rank]))


@compiled
def route_on_host(
    ids_TK: NDArray[np.int64],
    phase_T: NDArray[np.int8],
    counts_AE: NDArray[np.int64],
    slots_EC: NDArray[np.int32],
    thresholds_EC: NDArray[np.int32],
    poured_X: NDArray[np.int32],
    row_E: NDArray[np.int32],
    ground_R: NDArray[np.int32],
    offset: int,
    num_ranks: int,
    slots_per_rank: int,
    source: int,
    slots_TK: NDArray[np.int64],
) -> None:
    """`route_by_own_counts`: the same bits, in the order of experts and tokens.

    ids_TK, slots_TK: of one integer type. counts_AE: added to. slots_TK: filled.
    """
    tokens_E = _count(ids_TK, phase_T, counts_AE)
    # One by one, since tuples take microseconds to hand over from Python.
    tables = HostTables(slots_EC, thresholds_EC, poured_X, row_E, ground_R)
    bounds_XC = pour_bounds(tokens_E, tables, offset, Ranks(num_ranks, slots_per_rank, source))
    pours = tokens_E.sum() * RANKS_PER_PAIR >= num_ranks
    seen_E = np.zeros(tokens_E.size, np.int64)
    for token in range(ids_TK.shape[0]):
        token_hash = (token * HASH_STEP + offset) & 0xFFFF
        for k in range(ids_TK.shape[1]):
            expert = ids_TK[token, k]
            if expert < 0 or expert >= tokens_E.size:
                slots_TK[token, k] = min(expert, -1)
                continue
            choice, row = 0, row_E[expert]
            if pours and row >= 0:
                while bounds_XC[row, choice] <= seen_E[expert]:
                    choice += 1
                seen_E[expert] += 1
            else:
                while thresholds_EC[expert, choice] <= token_hash:
                    choice += 1
            slots_TK[token, k] = slots_EC[expert, choice]


@compiled
def _count(
    ids_TK: NDArray[np.int64], phase_T: NDArray[np.int8], counts_AE: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [E]. Every phase is added up apart in `counts_AE`."""
    tokens_E = np.zeros(counts_AE.shape[1], np.int64)
    for token in range(ids_TK.shape[0]):
        phase = phase_T[token] if token < phase_T.size else IGNORED
        for k in range(ids_TK.shape[1]):
            expert = ids_TK[token, k]
            if 0 <= expert < tokens_E.size:
                tokens_E[expert] += 1
                counts_AE[phase, expert] += 1
    return tokens_E


@compiled
def pour_bounds(
    tokens_E: NDArray[np.int64],
    tables: HostTables,
    offset: int,
    ranks: Ranks,
) -> NDArray[np.int64]:
    """int64 [X, C], as `bounds_torch` in kernels/route_by_own_counts.py."""
    slots_EC, thresholds_EC, poured_X, _, ground_R = tables
    num_ranks, slots_per_rank, source = ranks
    bounds_XC = np.zeros((poured_X.size, slots_EC.shape[1]), np.int64)
    if not poured_X.size:
        return bounds_XC
    units_EC = np.zeros(slots_EC.shape, np.int64)
    replicas_E = np.zeros(tokens_E.size, np.int64)
    pairs = tokens_E.sum()
    load_R = np.empty(num_ranks, np.int64)
    for rank in range(num_ranks):
        load_R[rank] = (pairs * ground_R[rank]) >> (16 - UNIT_BITS)
    for expert in range(tokens_E.size):
        lower = 0
        for j in range(slots_EC.shape[1]):
            if slots_EC[expert, j] < 0:
                break
            upper = thresholds_EC[expert, j]
            units = (tokens_E[expert] * (upper - lower)) >> (16 - UNIT_BITS)
            units_EC[expert, j] = units
            load_R[slots_EC[expert, j] // slots_per_rank] += units
            replicas_E[expert] += 1
            lower = upper
    for _ in range(MOST_SWEEPS):
        shifted = 0
        for expert in poured_X:
            if expert >= 0 and tokens_E[expert]:
                count = replicas_E[expert]
                held_by = slots_EC[expert, :count] // slots_per_rank
                volume = tokens_E[expert] << UNIT_BITS
                shift = _pour_expert(volume, held_by, load_R, units_EC[expert, :count])
                shifted = max(shifted, shift)
        if shifted < 1 << UNIT_BITS:
            break
    for row in range(poured_X.size):
        expert = poured_X[row]
        if expert < 0:
            continue
        total = (((expert + source) * HASH_STEP + offset) & 0xFFFF) >> (16 - UNIT_BITS)
        for j in range(replicas_E[expert]):
            total += units_EC[expert, j]
            bounds_XC[row, j] = min(total >> UNIT_BITS, tokens_E[expert])
        bounds_XC[row, replicas_E[expert] - 1] = tokens_E[expert]
    return bounds_XC


@compiled
def pour_tokens(
    tokens_E: NDArray[np.int64],
    tables: HostTables,
    offset: int,
    ranks: Ranks,
) -> NDArray[np.float64]:
    """float64 [R], the tokens that each rank gets of one source's, as `route_on_host` sends them."""
    bounds_XC = pour_bounds(tokens_E, tables, offset, ranks)
    slots_EC, thresholds_EC, _, row_E, _ = tables
    load_R = np.zeros(ranks.total)
    pours = tokens_E.sum() * RANKS_PER_PAIR >= ranks.total
    for expert in range(tokens_E.size):
        row, lower = row_E[expert], 0.0
        for j in range(slots_EC.shape[1]):
            if slots_EC[expert, j] < 0:
                break
            if pours and row >= 0:
                upper = float(bounds_XC[row, j])
            else:
                upper = tokens_E[expert] * thresholds_EC[expert, j] / 65536
            load_R[slots_EC[expert, j] // ranks.slots] += upper - lower
            lower = upper
    return load_R


@compiled
def _pour_expert(
    volume: int, ranks: NDArray[np.int32], load_R: NDArray[np.int64], units: NDArray[np.int64]
) -> int:
    """The most that a replica gets more or less when one expert's tokens are poured anew; changes the
    ranks' loads by it. units: int64 [C].
    """
    floors = np.empty(units.size, np.int64)
    for j in range(units.size):
        floors[j] = load_R[ranks[j]] - units[j]
    level = _level(floors, volume)
    most = 0
    for j in range(units.size):
        poured = max(level - floors[j], 0)
        most = max(most, abs(poured - units[j]))
        load_R[ranks[j]] += poured - units[j]
        units[j] = poured
    return most


@compiled
def _level(floors: NDArray[np.int64], volume: int) -> int:
    """See `_levels` in kernels/route_by_own_counts.py."""
    level = 1 << 30
    while True:
        total, wet = volume, 0
        for floor in floors:
            if floor < level:
                total += floor
                wet += 1
        lowered = min(level, total // wet)
        if lowered == level:
            return level
        level = lowered
