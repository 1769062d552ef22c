"""Sources: which replica each changed slot is filled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.topology import LINKS, Link, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """One slot to fill and the slot to fill it from; slot numbers count over all ranks."""

    layer: int
    expert: int
    src_rank: int
    src_slot: int
    dst_rank: int
    dst_slot: int
    link: Link


def choose_sources(
    source: Placement,
    target: Placement,
    *,
    layers: Sequence[int],
    topology: Topology,
    expert_bytes_L: Sequence[int],
) -> tuple[Fetch, ...]:
    """A fetch for each slot of `layers` that differs, in the order of layers and slots.

    The nearest replica in `source` serves: on the rank itself, then on its node, then elsewhere.
    Among equals it is the one whose rank has the fewest bytes to send so far.
    """
    sent_bytes_R = np.zeros(source.num_ranks, dtype=np.int64)
    fetches = []
    for layer in layers:
        changed = np.flatnonzero(source.slots_LP[layer] != target.slots_LP[layer])
        replicas = source.replica_slots(layer) if changed.size else None
        for dst_slot in changed.tolist():
            assert replicas is not None
            fetch = _fetch(target, layer, dst_slot, replicas, sent_bytes_R, topology)
            if fetch.link != "local":
                sent_bytes_R[fetch.src_rank] += expert_bytes_L[layer]
            fetches.append(fetch)
    return tuple(fetches)


def _fetch(
    target: Placement,
    layer: int,
    dst_slot: int,
    replicas: NDArray[np.int32],
    sent_bytes_R: NDArray[np.int64],
    topology: Topology,
) -> Fetch:
    expert = int(target.slots_LP[layer, dst_slot])
    dst_rank = dst_slot // target.slots_per_rank

    def distance(slot: int) -> tuple[int, int, int]:
        rank = slot // target.slots_per_rank
        return LINKS.index(topology.link(rank, dst_rank)), int(sent_bytes_R[rank]), slot

    src_slot = min((slot for slot in replicas[expert].tolist() if slot >= 0), key=distance)
    src_rank = src_slot // target.slots_per_rank
    return Fetch(
        layer=layer,
        expert=expert,
        src_rank=src_rank,
        src_slot=src_slot,
        dst_rank=dst_rank,
        dst_slot=dst_slot,
        link=topology.link(src_rank, dst_rank),
    )
