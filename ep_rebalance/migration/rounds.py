"""Rounds: which bytes of which moves travel together.

Letters: `M` moves, `N` rounds, `X` transfers, `K` layers in the order of their commits; others as in
`placement.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.sources import IntArray

CHUNK_BYTES = 256
"""Experts are cut at multiples of this, so that their parts stay aligned and few are tiny."""


class MoveColumns(NamedTuple):
    """The moves of a migration, in the order in which their layers are committed.

    src_rank_M, dst_rank_M: int64 [M]. The ranks of each move.
    bytes_M: int64 [M], bytes. Size of the packed expert that it brings.
    far_M: int64 [M]. 1 for a move between nodes, else 0.
    turn_M: int64 [M]. Which commit it belongs to, from 0.
    """

    src_rank_M: IntArray
    dst_rank_M: IntArray
    bytes_M: IntArray
    far_M: IntArray
    turn_M: IntArray


class Limits(NamedTuple):
    """What holds for each rank.

    ranks: how many there are.
    staging_slots: experts that may be on their way to it, or have arrived and wait for their commit.
    max_bytes: bound on what it sends, and on what it receives, in one round.
    max_far_bytes: the same for moves between nodes.
    """

    ranks: int
    staging_slots: int
    max_bytes: int
    max_far_bytes: int


@compiled
def fill_rounds(columns: MoveColumns, limits: Limits) -> tuple[IntArray, IntArray, IntArray]:
    """Fill rounds greedily, so that the busiest rank's link is never idle.

    A move may begin once its destination has room for it. Experts are given room in the order of their
    commits, so those of the next commit always have it, and moves cannot wait for each other.

    Returns (first_N1, transfers_3X, last_K): int64 [N + 1], where the transfers of each round begin;
    int64 [3, X], the move, first byte and end of each transfer, within a round in the order of moves;
    int64 [K], the round after which the layers up to this one are whole. What they occupied is free in
    the next round.
    """
    src_rank_M, dst_rank_M, bytes_M, _, turn_M = columns
    left_M, size_M = bytes_M.copy(), np.zeros_like(bytes_M)
    owed_2R = _owed(columns, limits.ranks)
    first_K1 = _first_of_turn(turn_M)
    last_K = np.zeros(first_K1.size - 1, np.int64)
    arrival_M, next_R, stop_R = _arrivals(dst_rank_M, limits.ranks)
    room_R = np.full(limits.ranks, limits.staging_slots)
    transfers_3X = np.empty((3, 4 * bytes_M.size), np.int64)
    first = np.zeros(64, np.int64)
    transfers, rounds, turn = 0, 0, 0
    moving = np.empty(0, np.int64)
    while turn < last_K.size:
        moving = _with_beginning(moving, arrival_M, next_R, stop_R, room_R)
        order = _by_urgency(columns, moving, owed_2R)
        _fill_round(columns, limits, left_M, order, size_M)
        if transfers + moving.size > transfers_3X.shape[1]:
            transfers_3X = np.concatenate((transfers_3X, np.empty_like(transfers_3X)), axis=1)
        for move in moving:
            if size_M[move]:
                start = bytes_M[move] - left_M[move]
                transfers_3X[0, transfers] = move
                transfers_3X[1, transfers], transfers_3X[2, transfers] = start, start + size_M[move]
                left_M[move] -= size_M[move]
                owed_2R[0, src_rank_M[move]] -= size_M[move]
                owed_2R[1, dst_rank_M[move]] -= size_M[move]
                transfers += 1
        while turn < last_K.size and not left_M[first_K1[turn] : first_K1[turn + 1]].any():
            last_K[turn] = rounds
            for rank in dst_rank_M[first_K1[turn] : first_K1[turn + 1]]:
                room_R[rank] += 1
            turn += 1
        moving = moving[left_M[moving] > 0]
        rounds += 1
        if rounds == first.size:
            first = np.concatenate((first, np.empty_like(first)))
        first[rounds] = transfers
    return first[: rounds + 1].copy(), transfers_3X[:, :transfers].copy(), last_K


@compiled
def _owed(columns: MoveColumns, num_ranks: int) -> IntArray:
    """int64 [2, R], bytes that each rank has yet to send and to receive."""
    owed_2R = np.zeros((2, num_ranks), np.int64)
    for move in range(columns.bytes_M.size):
        owed_2R[0, columns.src_rank_M[move]] += columns.bytes_M[move]
        owed_2R[1, columns.dst_rank_M[move]] += columns.bytes_M[move]
    return owed_2R


@compiled
def _first_of_turn(turn_M: IntArray) -> IntArray:
    """int64 [K + 1], where the moves of each commit begin."""
    return np.searchsorted(turn_M, np.arange(turn_M[-1] + 2))


@compiled
def _arrivals(dst_rank_M: IntArray, num_ranks: int) -> tuple[IntArray, IntArray, IntArray]:
    """The moves into rank 0 in order, then those into rank 1 and so on; where each rank's begin and end."""
    arrival_M = np.argsort(dst_rank_M, kind="mergesort")
    bounds = np.searchsorted(dst_rank_M[arrival_M], np.arange(num_ranks + 1))
    return arrival_M, bounds[:-1].copy(), bounds[1:].copy()


@compiled
def _with_beginning(
    moving: IntArray, arrival_M: IntArray, next_R: IntArray, stop_R: IntArray, room_R: IntArray
) -> IntArray:
    """The moves that are on their way and those for which there is room now, in order."""
    begin_R = np.minimum(room_R, stop_R - next_R)
    beginning = np.empty(moving.size + begin_R.sum(), np.int64)
    beginning[: moving.size] = moving
    count = moving.size
    for rank in range(room_R.size):
        for _ in range(begin_R[rank]):
            beginning[count] = arrival_M[next_R[rank]]
            next_R[rank] += 1
            room_R[rank] -= 1
            count += 1
    return np.sort(beginning)


@compiled
def _by_urgency(columns: MoveColumns, moving: IntArray, owed_2R: IntArray) -> IntArray:
    """Of the moves on their way, first those whose busier rank has most left to send or receive; ties by
    number.
    """
    haste = np.empty(moving.size, np.int64)
    for i, move in enumerate(moving):
        haste[i] = -max(owed_2R[0, columns.src_rank_M[move]], owed_2R[1, columns.dst_rank_M[move]])
    return moving[np.argsort(haste, kind="mergesort")]


@compiled
def _fill_round(
    columns: MoveColumns, limits: Limits, left_M: IntArray, order: IntArray, size_M: IntArray
) -> None:
    """Write to `size_M` how many bytes of each move of `order`, most urgent first, go in the next round.

    Unless it is the rest of an expert, a size is a multiple of CHUNK_BYTES.
    """
    most = np.array([limits.max_bytes, min(limits.max_far_bytes, limits.max_bytes)])
    chunk = min(CHUNK_BYTES, most[1])
    send_2R, receive_2R = (
        np.empty((2, limits.ranks), np.int64),
        np.empty((2, limits.ranks), np.int64),
    )
    for kind in range(2):
        send_2R[kind], receive_2R[kind] = most[kind], most[kind]
    for move in order:
        src, dst, far = columns.src_rank_M[move], columns.dst_rank_M[move], columns.far_M[move]
        room = min(send_2R[0, src], receive_2R[0, dst])
        if far:
            room = min(room, send_2R[1, src], receive_2R[1, dst])
        size = left_M[move] if left_M[move] <= room else room // chunk * chunk
        size_M[move] = size
        for kind in range(1 + far):
            send_2R[kind, src] -= size
            receive_2R[kind, dst] -= size
