"""What a migration consists of, as columns: tens of thousands of objects would take longer to make
than to work out.
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
    """One expert of one layer on its way into a slot; slot numbers count over all ranks.

    staging: place in the destination rank's staging memory, from 0 in each batch.
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
    """The moves of a batch, in the order of layers and slots; every field is int64 [M]."""

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
    """All-to-alls, one after the other; each has at most one transfer of each move.

    first_N1: int64 [N + 1]; round n makes transfers `first_N1[n]` to `first_N1[n + 1]`.
    move, start, stop: int64 [X]; a transfer is the bytes `start` to `stop` of the packed expert that
        the move moves.
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

    itinerary: the part of the rank that the migration was worked out for, None if for none.
    """

    layers: tuple[int, ...]
    moves: Moves
    rounds: Rounds
    itinerary: Itinerary | None = None

    def arrivals(self, rank: int) -> tuple[Move, ...]:
        """The moves into slots of one rank."""
        return tuple(self.moves[i] for i in np.flatnonzero(self.moves.dst_rank == rank).tolist())

    def num_moves(self, link: Link) -> int:
        """Moves over links of that kind."""
        return int(np.count_nonzero(self.moves.over(link)))

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes over links of that kind; over all of them if None."""
        bytes_X = self.rounds.stop - self.rounds.start
        if link is not None:
            bytes_X = bytes_X[self.moves.over(link)[self.rounds.move]]
        return int(bytes_X.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Migration:
    """The way from `source` to `target`; a layer whose quotas alone change is in no batch.

    quotas_LP: float64 [L, P], the quotas to serve `target` with.
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
        """Engine steps that it takes: one for each round, and one for each batch's vote."""
        return self.num_rounds + len(self.batches)

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes over links of that kind; over all of them if None."""
        return sum(batch.num_bytes(link) for batch in self.batches)
