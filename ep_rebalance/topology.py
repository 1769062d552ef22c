"""Topology: which ranks share a node, how fast their links are, and which ranks route the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Link = Literal["local", "intranode", "internode"]
LINKS: tuple[Link, ...] = ("local", "intranode", "internode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """EP ranks grouped into nodes.

    node_of_rank: R numbers, from 0. The node of each EP rank.
    bytes_per_second: one number for each of `LINKS`. What one rank can move over such a link.
    round_seconds: seconds. What a round of a migration takes beside its bytes.
    ranks_per_source: how many neighbouring ranks route the same tokens: those of a tensor-parallel
        group without sequence parallelism, else 1. Together they are one *source* of tokens.
    """

    node_of_rank: tuple[int, ...]
    bytes_per_second: tuple[float, float, float] = (200e9, 20e9, 5e9)
    round_seconds: float = 1e-4
    ranks_per_source: int = 1

    def __post_init__(self) -> None:
        if not self.node_of_rank or min(self.node_of_rank) < 0:
            raise ValueError(
                f"a topology needs at least one rank and node numbers from 0, got {self.node_of_rank}"
            )
        if len(self.bytes_per_second) != len(LINKS) or min(self.bytes_per_second) <= 0:
            raise ValueError(
                f"bytes_per_second={self.bytes_per_second} must be positive for {LINKS}"
            )
        if self.round_seconds < 0:
            raise ValueError(f"round_seconds={self.round_seconds} must be 0 or more")
        if self.ranks_per_source < 1 or self.num_ranks % self.ranks_per_source:
            raise ValueError(
                f"{self.num_ranks} ranks do not divide into sources of {self.ranks_per_source}"
            )

    @classmethod
    def single_node(cls, num_ranks: int) -> Topology:
        return cls(node_of_rank=(0,) * num_ranks)

    @classmethod
    def node_by_node(cls, num_ranks: int, ranks_per_node: int) -> Topology:
        """Ranks fill one node after another; the last node may have fewer.

        Raises ValueError if `ranks_per_node` is below 1.
        """
        if ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be 1 or more, not {ranks_per_node}")
        return cls(node_of_rank=tuple(rank // ranks_per_node for rank in range(num_ranks)))

    def with_links(
        self,
        *,
        intranode: float | None = None,
        internode: float | None = None,
        round_seconds: float | None = None,
    ) -> Topology:
        """The same with other figures, where there are any."""
        local, near, far = self.bytes_per_second
        return replace(
            self,
            bytes_per_second=(local, intranode or near, internode or far),
            round_seconds=self.round_seconds if round_seconds is None else round_seconds,
        )

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1

    @property
    def links_between_ranks(self) -> tuple[Link, ...]:
        """The kinds of link that there are."""
        nodes = len(set(self.node_of_rank))
        near: tuple[Link, ...] = ("intranode",) if nodes < self.num_ranks else ()
        return (*near, "internode") if nodes > 1 else near

    @property
    def internode_price(self) -> float:
        """How many times as long a move between nodes takes as one over the fastest links that there are:
        1 where every rank is a node of its own, and at least 1.
        """
        if "intranode" not in self.links_between_ranks:
            return 1.0
        return max(self.seconds(1.0, "internode") / self.seconds(1.0, "intranode"), 1.0)

    @property
    def source_of_rank(self) -> tuple[int, ...]:
        """The source that each rank belongs to: R numbers, from 0."""
        return tuple(rank // self.ranks_per_source for rank in range(self.num_ranks))

    def link(self, source: int, destination: int) -> Link:
        """The kind of link between two ranks."""
        if source == destination:
            return "local"
        same_node = self.node_of_rank[source] == self.node_of_rank[destination]
        return "intranode" if same_node else "internode"

    def seconds(self, num_bytes: float, link: Link) -> float:
        """How long `num_bytes` take over a link of that kind."""
        return num_bytes / self.bytes_per_second[LINKS.index(link)]
