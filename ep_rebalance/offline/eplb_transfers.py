"""Transfers of vLLM's balancer: which rank sends an expert where, over which links, and for how long.

The choice is that of `move_to_buffer` (vllm/distributed/eplb/rebalance_execute.py): a rank fetches an
expert once if it does not hold it yet, and the ranks that hold it take the receivers in turns, wherever
they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.topology import LINKS, Link, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTransfers:
    """What it takes to give a layer another map.

    moved: slots that get another expert.
    bytes: bytes over each kind of link that is used; `local` are copies within a rank.
    seconds: how long the busiest rank sends, or receives, if nothing else is on its links. All of a
        layer's transfers are under way at once.
    serial: the most transfers that a rank makes one after another.
    """

    moved: int
    bytes: dict[Link, int]
    seconds: float
    serial: int


def layer_transfers(
    old_P: NDArray[np.integer],
    new_P: NDArray[np.integer],
    *,
    topology: Topology,
    expert_bytes: int,
) -> LayerTransfers:
    """The transfers from one map of a layer to another.

    old_P, new_P: [P], the expert in each slot. A rank may hold an expert twice.
    expert_bytes: bytes. One expert.
    """
    sent = sends(old_P, new_P, topology.num_ranks)
    moved = int(np.count_nonzero(old_P != new_P))
    slots: dict[Link, int] = dict.fromkeys(LINKS, 0)
    seconds_2R, transfers_2R = (np.zeros((2, topology.num_ranks)) for _ in range(2))
    for _, source, destination in sent:
        link = topology.link(source, destination)
        slots[link] += 1
        for side, rank in enumerate((source, destination)):
            seconds_2R[side, rank] += topology.seconds(expert_bytes, link)
            transfers_2R[side, rank] += 1
    slots["local"] = moved - len(sent)
    return LayerTransfers(
        moved=moved,
        bytes={link: count * expert_bytes for link, count in slots.items() if count},
        seconds=float(seconds_2R.max()),
        serial=int(transfers_2R.max()),
    )


def sends(
    old_P: NDArray[np.integer], new_P: NDArray[np.integer], num_ranks: int
) -> list[tuple[int, int, int]]:
    """(expert, source, destination) for each rank that an expert goes to, in the order of experts."""
    experts = int(max(old_P.max(), new_P.max())) + 1
    held_RE, wanted_RE = (np.zeros((num_ranks, experts), dtype=bool) for _ in range(2))
    for holds_RE, slots_P in ((held_RE, old_P), (wanted_RE, new_P)):
        np.put_along_axis(holds_RE, slots_P.reshape(num_ranks, -1), True, axis=1)
    arriving_RE = wanted_RE & ~held_RE
    sent: list[tuple[int, int, int]] = []
    for expert in np.flatnonzero(arriving_RE.any(axis=0)).tolist():
        sources, destinations = (
            np.flatnonzero(ranks_R[:, expert]).tolist() for ranks_R in (held_RE, arriving_RE)
        )
        each = len(destinations) // len(sources)
        for place, destination in enumerate(destinations):
            even = place < each * len(sources)
            turn = place // each if even else place - each * len(sources)
            sent.append((expert, sources[turn], destination))
    return sent
