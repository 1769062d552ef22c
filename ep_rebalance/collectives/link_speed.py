"""Link speed: what ranks can exchange, measured once before serving.

All ranks send at the same time, each to one rank of its node, or of another node, as they do in a round
of a migration. A round ends when its last rank is done, so the slowest rank's time counts; of several
exchanges the median, since one may be held up by something else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from ep_rebalance.config import LinksConfig
from ep_rebalance.host_memory import pins
from ep_rebalance.topology import LINKS, Link, Topology

logger = logging.getLogger(__name__)

SIZES = (64 << 10, 512 << 10, 4 << 20, 32 << 20)
"""Bytes that each rank sends. Fast links need the larger ones to show their speed."""
LONGEST_SECONDS = 0.05
"""The next size is tried if it should take no longer, so that slow links do not hold the start up."""
EXCHANGES = 3
"""Of each size, after one that is not timed."""
_NOTHING = 16
"""Bytes of an exchange that shows what one takes beside its bytes."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Whom each rank sends to; -1 where it has no peer. No two ranks send to the same one."""

    to_R: tuple[int, ...]

    def splits(self, rank: int, num_bytes: int) -> tuple[list[int], list[int]]:
        """Bytes that `rank` sends to each rank, and receives from each."""
        sent = [num_bytes if peer == self.to_R[rank] else 0 for peer in range(len(self.to_R))]
        return sent, [num_bytes if to == rank else 0 for to in self.to_R]

    def __bool__(self) -> bool:
        return max(self.to_R) >= 0


def ring(topology: Topology, link: Link) -> Ring:
    """Peers for links of a kind: the next rank of the node, or the rank that has the same place in the next
    node. It has no peers where there are no such links.
    """
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(topology.node_of_rank):
        by_node.setdefault(node, []).append(rank)
    nodes = [by_node[node] for node in sorted(by_node)]
    to_R = [-1] * topology.num_ranks
    if link == "intranode":
        for ranks in nodes:
            for rank, peer in zip(ranks, ranks[1:] + ranks[:1], strict=True):
                to_R[rank] = peer if peer != rank else -1
    elif link == "internode" and len(nodes) > 1:
        fewest = min(map(len, nodes))
        for ranks, next_ranks in zip(nodes, nodes[1:] + nodes[:1], strict=True):
            for rank, peer in zip(ranks[:fewest], next_ranks[:fewest], strict=True):
                to_R[rank] = peer
    return Ring(tuple(to_R))


def with_measured_links(
    topology: Topology, links: LinksConfig, *, group: dist.ProcessGroup, device: torch.device
) -> Topology:
    """The topology with figures that are configured, else measured, the same on all ranks. Collective.

    Kinds of links that there are not keep the topology's figure.
    """
    timing = _Timing(group, device)
    known = topology.with_links(
        intranode=links.intranode_bytes_per_second,
        internode=links.internode_bytes_per_second,
        round_seconds=links.round_seconds,
    )
    near, far = ring(topology, "intranode"), ring(topology, "internode")
    if links.round_seconds is None:
        times = [timing.seconds(peers, _NOTHING) for peers in (near, far) if peers]
        known = known.with_links(round_seconds=max(times, default=None))
    measured: dict[str, float] = {}
    if near and links.intranode_bytes_per_second is None:
        measured["intranode"] = timing.bytes_per_second(near, known.round_seconds)
    if far and links.internode_bytes_per_second is None:
        measured["internode"] = timing.bytes_per_second(far, known.round_seconds)
    found = known.with_links(**measured)
    if dist.get_rank(group) == 0:
        _log(found)
    return found


class _Timing:
    """Timed exchanges of one group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank = dist.get_rank(group)

    def bytes_per_second(self, peers: Ring, round_seconds: float) -> float:
        """What the slowest rank sends, and receives, in a second."""
        size, seconds = SIZES[0], self.seconds(peers, SIZES[0])
        for larger in SIZES[1:]:
            if seconds * larger / size > LONGEST_SECONDS:
                break
            size, seconds = larger, self.seconds(peers, larger)
        # At least a part of the time, in case this exchange was quicker than that of nothing.
        return size / max(seconds - round_seconds, seconds / 4)

    def seconds(self, peers: Ring, num_bytes: int) -> float:
        """The median time of an exchange on the slowest rank."""
        sent_R, received_R = peers.splits(self._rank, num_bytes)
        sent, received = (
            torch.zeros(sum(part), dtype=torch.uint8, device=self._device)
            for part in (sent_R, received_R)
        )
        self._exchange(received, sent, received_R, sent_R)
        own = median(self._exchange(received, sent, received_R, sent_R) for _ in range(EXCHANGES))
        slowest = torch.tensor([own], dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self._group)
        return float(slowest.item())

    def _exchange(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_R: Sequence[int],
        sent_R: Sequence[int],
    ) -> float:
        self._wait()
        began = time.perf_counter()
        dist.all_to_all_single(received, sent, list(received_R), list(sent_R), group=self._group)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if pins(self._device):
            torch.get_device_module(self._device).synchronize(self._device)


def _log(topology: Topology) -> None:
    speeds = dict(zip(LINKS, topology.bytes_per_second, strict=True))
    where: dict[Link, str] = {"intranode": "within a node", "internode": "between nodes"}
    told = [f"{speeds[link] / 1e9:.3g} GB/s {where[link]}" for link in topology.links_between_ranks]
    logger.info(
        "ep_rebalance: %d ranks on %d nodes exchange %s, and an exchange takes %.0f us beside its bytes",
        topology.num_ranks,
        len(set(topology.node_of_rank)),
        " and ".join(told) or "nothing",
        topology.round_seconds * 1e6,
    )
