"""Itinerary: what one rank sends and receives in each round, and where it lies on the wire.

Worked out with the schedule, off the step path, so that a round costs no more than its launches, and
so that nothing is left in it that one rank could fail at alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ep_rebalance.compiled import compiled
from ep_rebalance.planning.sources import Fetches, IntArray

CHECKSUM_BYTES = 16
"""On the wire every range is padded to this, and behind an expert's last range is its checksum."""


class Leg(NamedTuple):
    """A byte range of a packed expert on its way from or to this rank.

    place: the local slot that it is read from, or the place in the staging memory that it goes to.
    start, stop: bytes of the packed expert. offset: where they begin on the wire. checksum: where the
    expert's checksum is on the wire, or -1 if this is not its last range.
    """

    layer: int
    place: int
    start: int
    stop: int
    offset: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Legs:
    """One direction of an itinerary: N rounds, R ranks, X legs.

    bytes_NR: int64 [N, R], on the wire to or from each peer; the wire is laid out by peer.
    first_N1: int64 [N + 1]; round n has legs `first_N1[n]` to `first_N1[n + 1]`.
    legs_X6: int64 [X, 6], the fields of `Leg`.
    """

    bytes_NR: IntArray
    first_N1: IntArray
    legs_X6: IntArray

    def splits(self, number: int) -> list[int]:
        """Bytes to or from each peer in one round."""
        splits: list[int] = self.bytes_NR[number].tolist()
        return splits

    def of_round(self, number: int) -> Iterator[Leg]:
        first, last = self.first_N1[number : number + 2]
        return map(Leg._make, self.legs_X6[first:last].tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Itinerary:
    """One rank's part in the rounds of a batch.

    busiest_bytes: most that any rank sends or receives in a round, on the wire; the same on all ranks.
    """

    rank: int
    sends: Legs
    receives: Legs
    busiest_bytes: int


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
    """The part of `rank`. rounds: as of `fill_rounds`, with the moves' numbers."""
    first_N1, transfers_3X = rounds
    bytes_M = expert_bytes_L[moves.layer]
    src_M, dst_M = moves.src_rank, moves.dst_rank
    local_slot_M = moves.src_slot % slots_per_rank
    wire_X = _wire_bytes(transfers_3X, bytes_M)
    ways = []
    for here_M, peer_M, place_M in ((src_M, dst_M, local_slot_M), (dst_M, src_M, staging_M)):
        of_rank = (rank, here_M, peer_M, moves.layer, place_M, bytes_M)
        bytes_NR, leg_first_N1, legs_X6 = _legs(*of_rank, first_N1, transfers_3X, wire_X, num_ranks)
        ways.append(Legs(bytes_NR=bytes_NR, first_N1=leg_first_N1, legs_X6=legs_X6))
    busiest = int(_busiest(src_M, dst_M, first_N1, transfers_3X, wire_X, num_ranks))
    return Itinerary(rank=rank, sends=ways[0], receives=ways[1], busiest_bytes=busiest)


@compiled
def _wire_bytes(transfers_3X: IntArray, bytes_M: IntArray) -> IntArray:
    """Bytes of each transfer on the wire."""
    wire_X = np.empty(transfers_3X.shape[1], np.int64)
    for transfer in range(wire_X.size):
        move, start, stop = transfers_3X[:, transfer]
        units = -(-(stop - start) // CHECKSUM_BYTES) + (stop == bytes_M[move])
        wire_X[transfer] = units * CHECKSUM_BYTES
    return wire_X


@compiled
def _legs(
    rank: int,
    here_M: IntArray,
    peer_M: IntArray,
    layer_M: IntArray,
    place_M: IntArray,
    bytes_M: IntArray,
    first_N1: IntArray,
    transfers_3X: IntArray,
    wire_X: IntArray,
    num_ranks: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """The fields of `Legs`, where `here_M` is the rank at this end of each move."""
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
        offset_R = np.cumsum(bytes_NR[number]) - bytes_NR[number]
        for transfer in range(first, last):
            move, start, stop = transfers_3X[:, transfer]
            if here_M[move] != rank:
                continue
            offset = offset_R[peer_M[move]]
            offset_R[peer_M[move]] += wire_X[transfer]
            legs_X6[leg, 0], legs_X6[leg, 1] = layer_M[move], place_M[move]
            legs_X6[leg, 2], legs_X6[leg, 3], legs_X6[leg, 4] = start, stop, offset
            ends = stop == bytes_M[move]
            legs_X6[leg, 5] = offset_R[peer_M[move]] - CHECKSUM_BYTES if ends else -1
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
    busiest = 0
    for number in range(first_N1.size - 1):
        sent_R, received_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
        for transfer in range(first_N1[number], first_N1[number + 1]):
            move = transfers_3X[0, transfer]
            sent_R[src_rank_M[move]] += wire_X[transfer]
            received_R[dst_rank_M[move]] += wire_X[transfer]
        busiest = max(busiest, sent_R.max(), received_R.max())
    return busiest
