"""Rounds: which bytes of which moves travel together.

Letters: `M` moves, `N` rounds, `X` transfers; others as in `placement.py`.
"""

from __future__ import annotations

import numpy as np

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.sources import IntArray

CHUNK_BYTES = 256
"""Experts are cut at multiples of this, so that their parts stay aligned and few are tiny."""


@compiled
def fill_rounds(
    src_rank_M: IntArray, dst_rank_M: IntArray, bytes_M: IntArray, num_ranks: int, max_bytes: int
) -> tuple[IntArray, IntArray]:
    """Fill rounds greedily: first with the moves of the ranks that have most left to send or receive.

    src_rank_M, dst_rank_M: int64 [M]. The ranks of each move.
    bytes_M: int64 [M], bytes. Size of the packed expert that each move brings.
    max_bytes: bound on what a rank sends, and on what it receives, in one round.

    Returns (first_N1, transfers_3X): int64 [N + 1], where the transfers of each round begin, and
    int64 [3, X], the move, first byte and end of each transfer; within a round in the order of moves.
    """
    chunk = min(CHUNK_BYTES, max_bytes)
    left_M, size_M = bytes_M.copy(), np.zeros_like(bytes_M)
    transfers_3X = np.empty((3, 4 * bytes_M.size), np.int64)
    first = np.zeros(64, np.int64)
    transfers, rounds = 0, 0
    while True:
        order = _by_urgency(src_rank_M, dst_rank_M, left_M, num_ranks)
        if not order.size:
            return first[: rounds + 1].copy(), transfers_3X[:, :transfers].copy()
        _fill_round(src_rank_M, dst_rank_M, left_M, order, num_ranks, max_bytes, chunk, size_M)
        if transfers + order.size > transfers_3X.shape[1]:
            transfers_3X = np.concatenate((transfers_3X, np.empty_like(transfers_3X)), axis=1)
        for move in range(bytes_M.size):
            if size_M[move]:
                start = bytes_M[move] - left_M[move]
                transfers_3X[0, transfers] = move
                transfers_3X[1, transfers], transfers_3X[2, transfers] = start, start + size_M[move]
                left_M[move] -= size_M[move]
                transfers += 1
        rounds += 1
        if rounds == first.size:
            first = np.concatenate((first, np.empty_like(first)))
        first[rounds] = transfers


@compiled
def _by_urgency(
    src_rank_M: IntArray, dst_rank_M: IntArray, left_M: IntArray, num_ranks: int
) -> IntArray:
    """The moves with bytes left; first those whose busier rank has most left, ties by number."""
    send_R, receive_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for move in range(left_M.size):
        send_R[src_rank_M[move]] += left_M[move]
        receive_R[dst_rank_M[move]] += left_M[move]
    moves = np.flatnonzero(left_M)
    haste = np.empty(moves.size, np.int64)
    for i, move in enumerate(moves):
        haste[i] = -max(send_R[src_rank_M[move]], receive_R[dst_rank_M[move]])
    return moves[np.argsort(haste, kind="mergesort")]


@compiled
def _fill_round(
    src_rank_M: IntArray,
    dst_rank_M: IntArray,
    left_M: IntArray,
    order: IntArray,
    num_ranks: int,
    max_bytes: int,
    chunk: int,
    size_M: IntArray,
) -> None:
    """Write to `size_M` how many bytes of each move go in the next round.

    order: the moves with bytes left, most urgent first.
    chunk: bytes. Unless it is the rest of an expert, a size is a multiple of this.
    """
    send_R, receive_R = np.full(num_ranks, max_bytes), np.full(num_ranks, max_bytes)
    size_M[:] = 0
    for move in order:
        room = min(send_R[src_rank_M[move]], receive_R[dst_rank_M[move]])
        size = left_M[move] if left_M[move] <= room else room // chunk * chunk
        size_M[move] = size
        send_R[src_rank_M[move]] -= size
        receive_R[dst_rank_M[move]] -= size
