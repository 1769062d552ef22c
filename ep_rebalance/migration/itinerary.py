"""Itinerary: what one rank sends and receives in each round, and where it lies on the wire.

It is worked out with the schedule, off the step path. A round then costs no more than its launches,
and leaves nothing to work out in which one rank could fail alone.

Letters: `N` rounds, `M` moves, `X` transfers and in `legs_X6` legs; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.sources import Fetches, IntArray

CHECKSUM_BYTES = 16
"""On the wire every byte range is padded to a multiple of this, and an expert's last range is followed
by its checksum."""


class Leg(NamedTuple):
    """A byte range of a packed expert on its way from or to this rank.

    place: the local slot that it is read from, or the place in the staging memory where it goes.
    start, stop: bytes of the packed expert.
    offset: bytes. Where the range begins on the wire.
    checksum: bytes. Where the expert's checksum is on the wire; -1 if this is not its last range.
    """

    layer: int
    place: int
    start: int
    stop: int
    offset: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Legs:
    """One direction of an itinerary.

    bytes_NR: int64 [N, R], bytes. On the wire to or from each peer; the wire is laid out by peer.
    first_N1: int64 [N + 1]. Round `n` has the legs `first_N1[n]` to `first_N1[n + 1]`.
    legs_X6: int64 [X, 6]. The fields of `Leg`.
    """

    bytes_NR: IntArray
    first_N1: IntArray
    legs_X6: IntArray

    def splits(self, number: int) -> list[int]:
        """Bytes to or from each peer in round `number`."""
        splits: list[int] = self.bytes_NR[number].tolist()
        return splits

    def of_round(self, number: int) -> Iterator[Leg]:
        """The legs of round `number`."""
        first, last = self.first_N1[number : number + 2]
        return map(Leg._make, self.legs_X6[first:last].tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Itinerary:
    """What one rank does in the rounds of a batch.

    busiest_bytes: bytes on the wire. The most that any rank sends or receives in a round; the same on
        all ranks.
    """

    rank: int
    sends: Legs
    receives: Legs
    busiest_bytes: int


class _Transfers(NamedTuple):
    """The transfers of all ranks, round by round.

    first_N1: int64 [N + 1]. Round `n` has the transfers `first_N1[n]` to `first_N1[n + 1]`.
    transfers_3X: int64 [3, X]. Move, first byte and end of each.
    wire_X: int64 [X], bytes. On the wire.
    """

    first_N1: IntArray
    transfers_3X: IntArray
    wire_X: IntArray


class _Ends(NamedTuple):
    """The moves as seen from one end.

    here_M: int64 [M]. The rank at this end.
    peer_M: int64 [M]. The rank at the other end.
    place_M: int64 [M]. As `Leg.place`, at this end.
    """

    here_M: IntArray
    peer_M: IntArray
    place_M: IntArray


def itinerary(
    rank: int,
    moves: Fetches,
    staging_M: IntArray,
    rounds: tuple[IntArray, IntArray],
    *,
    num_ranks: int,
    slots_per_rank: int,
    expert_bytes_L: IntArray,
) -> Itinerary:
    """What `rank` does in the rounds of a batch.

    staging_M: int64 [M]. The place of each move in its destination's staging memory.
    rounds: as returned by `fill_rounds` for these moves.
    expert_bytes_L: int64 [L], bytes. Packed size of one expert of each layer.
    """
    first_N1, transfers_3X = rounds
    bytes_M = expert_bytes_L[moves.layer]
    src_M, dst_M = moves.src_rank, moves.dst_rank
    local_slot_M = moves.src_slot % slots_per_rank
    wire_X = _wire_bytes(transfers_3X, bytes_M)
    transfers = _Transfers(first_N1, transfers_3X, wire_X)
    ways = []
    for ends in (_Ends(src_M, dst_M, local_slot_M), _Ends(dst_M, src_M, staging_M)):
        bytes_NR, leg_first_N1, legs_X6 = _legs(
            rank, ends, moves.layer, bytes_M, transfers, num_ranks
        )
        ways.append(Legs(bytes_NR=bytes_NR, first_N1=leg_first_N1, legs_X6=legs_X6))
    busiest = int(_busiest(src_M, dst_M, first_N1, transfers_3X, wire_X, num_ranks))
    return Itinerary(rank=rank, sends=ways[0], receives=ways[1], busiest_bytes=busiest)


@compiled
def _wire_bytes(transfers_3X: IntArray, bytes_M: IntArray) -> IntArray:
    """int64 [X], bytes of each transfer on the wire."""
    # ceil(size / CHECKSUM_BYTES) units, and one more behind the last range of an expert
    wire_X = np.empty(transfers_3X.shape[1], np.int64)
    for transfer in range(wire_X.size):
        move, start, stop = transfers_3X[:, transfer]
        units = -(-(stop - start) // CHECKSUM_BYTES) + (stop == bytes_M[move])
        wire_X[transfer] = units * CHECKSUM_BYTES
    return wire_X


@compiled
def _legs(
    rank: int,
    ends: _Ends,
    layer_M: IntArray,
    bytes_M: IntArray,
    transfers: _Transfers,
    num_ranks: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """The fields of `Legs` for `rank`, which is at this end of its moves."""
    here_M, peer_M, place_M = ends
    first_N1, transfers_3X, wire_X = transfers
    rounds, legs = first_N1.size - 1, 0
    for move in transfers_3X[0]:
        legs += here_M[move] == rank
    bytes_NR = np.zeros((rounds, num_ranks), np.int64)
    leg_first_N1 = np.zeros(rounds + 1, np.int64)
    legs_X6 = np.empty((legs, 6), np.int64)
    leg = 0
    for number in range(rounds):
        first, last = first_N1[number], first_N1[number + 1]
        for transfer in range(first, last):
            move = transfers_3X[0, transfer]
            if here_M[move] == rank:
                bytes_NR[number, peer_M[move]] += wire_X[transfer]
        # The wire is laid out by peer, and for each peer by transfer.
        offset_R = np.cumsum(bytes_NR[number]) - bytes_NR[number]
        for transfer in range(first, last):
            move, start, stop = transfers_3X[:, transfer]
            if here_M[move] != rank:
                continue
            offset = offset_R[peer_M[move]]
            offset_R[peer_M[move]] += wire_X[transfer]
            legs_X6[leg, 0], legs_X6[leg, 1] = layer_M[move], place_M[move]
            legs_X6[leg, 2], legs_X6[leg, 3], legs_X6[leg, 4] = start, stop, offset
            is_last = stop == bytes_M[move]
            legs_X6[leg, 5] = offset_R[peer_M[move]] - CHECKSUM_BYTES if is_last else -1
            leg += 1
        leg_first_N1[number + 1] = leg
    return bytes_NR, leg_first_N1, legs_X6


@compiled
def _busiest(
    src_rank_M: IntArray,
    dst_rank_M: IntArray,
    first_N1: IntArray,
    transfers_3X: IntArray,
    wire_X: IntArray,
    num_ranks: int,
) -> int:
    """The most bytes that any rank sends or receives in a round, on the wire."""
    busiest = 0
    for number in range(first_N1.size - 1):
        sent_R, received_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
        for transfer in range(first_N1[number], first_N1[number + 1]):
            move = transfers_3X[0, transfer]
            sent_R[src_rank_M[move]] += wire_X[transfer]
            received_R[dst_rank_M[move]] += wire_X[transfer]
        busiest = max(busiest, sent_R.max(), received_R.max())
    return busiest
