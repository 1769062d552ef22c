"""Batches: what a migration consists of.

Moves and transfers are kept as columns, because making tens of thousands of objects would take longer
than working them out.

Letters: `M` moves, `N` rounds, `X` transfers; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.migration.itinerary import Itinerary
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.sources import Fetches, IntArray
from ep_rebalance.topology import LINKS, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert of one layer on its way into a slot.

    src_slot, dst_slot: counted over all ranks.
    staging: place in the destination rank's staging memory.
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
    """The moves of a batch, in the order of layers and slots; every field is int64 [M], see `Move`.

    size: bytes. The packed expert that a move brings.
    """

    staging: IntArray
    size: IntArray

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

    def part(self, first: int, stop: int) -> Moves:
        """The moves `first` to `stop`."""
        columns = {field.name: getattr(self, field.name)[first:stop] for field in fields(self)}
        return Moves(**columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounds:
    """All-to-alls, one after another, with at most one transfer for each move.

    A transfer is a byte range of the packed expert that its move brings. Also moves of later batches are
    on their way, so that no link waits for the last move of a batch.

    first_N1: int64 [N + 1]. Round `n` makes the transfers `first_N1[n]` to `first_N1[n + 1]`.
    move: int64 [X]. Index of the move that a transfer belongs to, among all moves of the migration.
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
    """Layers that are committed together, as they are whole after the same round.

    first_move: how many moves of the migration belong to earlier batches.
    rounds: those since the batch before.
    itinerary: what one rank does, if the migration was worked out for a rank.
    """

    layers: tuple[int, ...]
    moves: Moves
    first_move: int
    rounds: Rounds
    itinerary: Itinerary | None = None

    def arrivals(self, rank: int) -> tuple[Move, ...]:
        """The moves into the slots of `rank`."""
        return tuple(self.moves[i] for i in np.flatnonzero(self.moves.dst_rank == rank).tolist())

    def num_moves(self, link: Link) -> int:
        """How many moves go over links of that kind."""
        return int(np.count_nonzero(self.moves.over(link)))

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes of its moves over links of that kind; over all links if None."""
        size_M = self.moves.size
        return int((size_M if link is None else size_M[self.moves.over(link)]).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Migration:
    """The way from `source` to `target`.

    quotas_LP: float64 [L, P]. The quotas to serve `target` with.
    batches: in order. A layer of which only the quotas change is in none of them.
    pace: how it goes.
    """

    source: Placement
    target: Placement
    quotas_LP: NDArray[np.float64]
    batches: tuple[Batch, ...]
    pace: Pace

    @property
    def num_moves(self) -> int:
        return sum(len(batch.moves) for batch in self.batches)

    @property
    def num_rounds(self) -> int:
        return sum(len(batch.rounds) for batch in self.batches)

    @property
    def num_steps(self) -> int:
        """How many engine steps it takes: one for each round. Ranks vote on a batch in the step of its last
        round, and commit it in the next.
        """
        return self.num_rounds

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes that go over links of that kind; over all links if None."""
        return sum(batch.num_bytes(link) for batch in self.batches)
