"""Batches: what a migration consists of.

Moves and transfers are kept as columns, because making tens of thousands of objects would take longer
than working them out.

Letters: `M` moves, `N` rounds, `X` transfers; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.migration.itinerary import Itinerary
from ep_rebalance.placement import Placement
from ep_rebalance.planning.sources import Fetches, IntArray
from ep_rebalance.topology import LINKS, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert of one layer on its way into a slot.

    src_slot, dst_slot: counted over all ranks.
    staging: place in the destination rank's staging memory, counted from 0 in each batch.
    """

    layer: int
    expert: int
    src_rank: int
    src_slot: int
    dst_rank: int
    dst_slot: int
    link: Link
    staging: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moves(Fetches):
    """The moves of a batch, in the order of layers and slots; every field is int64 [M], see `Move`."""

    staging: IntArray

    def __getitem__(self, index: int) -> Move:
        return Move(
            layer=int(self.layer[index]),
            expert=int(self.expert[index]),
            src_rank=int(self.src_rank[index]),
            src_slot=int(self.src_slot[index]),
            dst_rank=int(self.dst_rank[index]),
            dst_slot=int(self.dst_slot[index]),
            link=LINKS[self.link[index]],
            staging=int(self.staging[index]),
        )

    def __iter__(self) -> Iterator[Move]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounds:
    """All-to-alls, one after another, with at most one transfer for each move.

    A transfer is a byte range of the packed expert that its move brings.

    first_N1: int64 [N + 1]. Round `n` makes the transfers `first_N1[n]` to `first_N1[n + 1]`.
    move: int64 [X]. Index of the move that a transfer belongs to.
    start, stop: int64 [X], bytes. The range of the packed expert.
    """

    first_N1: IntArray
    move: IntArray
    start: IntArray
    stop: IntArray

    def __len__(self) -> int:
        return len(self.first_N1) - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Whole layers whose moves fit into the staging memory together.

    itinerary: what one rank does, if the migration was worked out for a rank.
    """

    layers: tuple[int, ...]
    moves: Moves
    rounds: Rounds
    itinerary: Itinerary | None = None

    def arrivals(self, rank: int) -> tuple[Move, ...]:
        """The moves into the slots of `rank`."""
        return tuple(self.moves[i] for i in np.flatnonzero(self.moves.dst_rank == rank).tolist())

    def num_moves(self, link: Link) -> int:
        """How many moves go over links of that kind."""
        return int(np.count_nonzero(self.moves.over(link)))

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes that go over links of that kind; over all links if None."""
        bytes_X = self.rounds.stop - self.rounds.start
        if link is not None:
            bytes_X = bytes_X[self.moves.over(link)[self.rounds.move]]
        return int(bytes_X.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Migration:
    """The way from `source` to `target`.

    quotas_LP: float64 [L, P]. The quotas to serve `target` with.
    batches: in order. A layer of which only the quotas change is in none of them.
    """

    source: Placement
    target: Placement
    quotas_LP: NDArray[np.float64]
    batches: tuple[Batch, ...]

    @property
    def num_moves(self) -> int:
        return sum(len(batch.moves) for batch in self.batches)

    @property
    def num_rounds(self) -> int:
        return sum(len(batch.rounds) for batch in self.batches)

    @property
    def num_steps(self) -> int:
        """How many engine steps it takes: one for each round, and one for the vote on each batch."""
        return self.num_rounds + len(self.batches)

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes that go over links of that kind; over all links if None."""
        return sum(batch.num_bytes(link) for batch in self.batches)
