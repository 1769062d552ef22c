"""Sources: which replica fills each slot whose expert changes.

Letters of this module: `F` fetches, see `Fetches`; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.placement import Placement
from ep_rebalance.topology import LINKS, Link, Topology

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fetches:
    """Slots to fill, and the slots to fill them from.

    Every field is int64 [F].

    src_slot, dst_slot: counted over all ranks.
    link: index into LINKS.
    """

    layer: IntArray
    expert: IntArray
    src_rank: IntArray
    src_slot: IntArray
    dst_rank: IntArray
    dst_slot: IntArray
    link: IntArray

    def __len__(self) -> int:
        return len(self.layer)

    def over(self, link: Link) -> NDArray[np.bool_]:
        """bool [F], which of them go over links of that kind."""
        over: NDArray[np.bool_] = self.link == LINKS.index(link)
        return over


def choose_sources(
    source: Placement,
    target: Placement,
    *,
    layers: Sequence[int],
    topology: Topology,
    expert_bytes_L: Sequence[int] | IntArray,
) -> Fetches:
    """One fetch for each slot of `layers` that differs, in the order of layers and slots.

    expert_bytes_L: [L], bytes. Size of one expert of each layer.

    An expert is fetched from its nearest replica in `source`: on the rank itself, else on its node,
    else on another. Of several equally near it is the one whose rank has the fewest bytes to send so
    far. Raises PlacementError if ranks have unequally many slots.
    """
    columns_7F = _nearest(
        source.slots_LP,
        target.slots_LP,
        source.num_experts,
        source.slots_per_rank,
        np.array(layers, dtype=np.int64),
        np.array(topology.node_of_rank, dtype=np.int64),
        np.array(expert_bytes_L, dtype=np.int64),
    )
    layer, expert, src_rank, src_slot, dst_rank, dst_slot, link = columns_7F
    return Fetches(
        layer=layer,
        expert=expert,
        src_rank=src_rank,
        src_slot=src_slot,
        dst_rank=dst_rank,
        dst_slot=dst_slot,
        link=link,
    )


@compiled
def _nearest(
    source_LP: NDArray[np.int32],
    target_LP: NDArray[np.int32],
    num_experts: int,
    slots_per_rank: int,
    layers: IntArray,
    node_R: IntArray,
    expert_bytes_L: IntArray,
) -> IntArray:
    """The fields of `Fetches` in their order, [7, F]."""
    sent_bytes_R = np.zeros(node_R.size, np.int64)
    columns_7F = np.empty((7, _changes(source_LP, target_LP, layers)), np.int64)
    fetch = 0
    for layer in layers:
        slots, first_E = _replicas(source_LP[layer], num_experts)
        for dst_slot in range(source_LP.shape[1]):
            expert = target_LP[layer, dst_slot]
            if expert == source_LP[layer, dst_slot]:
                continue
            dst_rank = dst_slot // slots_per_rank
            src_rank, src_slot, link = -1, -1, 3  # farther than any link
            for slot in slots[first_E[expert] : first_E[expert + 1]]:
                rank = slot // slots_per_rank
                distance = 0 if rank == dst_rank else 1 if node_R[rank] == node_R[dst_rank] else 2
                idler = distance == link and sent_bytes_R[rank] < sent_bytes_R[src_rank]
                if distance < link or idler:
                    src_rank, src_slot, link = rank, slot, distance
            if link:
                sent_bytes_R[src_rank] += expert_bytes_L[layer]
            columns_7F[0, fetch], columns_7F[1, fetch] = layer, expert
            columns_7F[2, fetch], columns_7F[3, fetch] = src_rank, src_slot
            columns_7F[4, fetch], columns_7F[5, fetch] = dst_rank, dst_slot
            columns_7F[6, fetch] = link
            fetch += 1
    return columns_7F


@compiled
def _changes(source_LP: NDArray[np.int32], target_LP: NDArray[np.int32], layers: IntArray) -> int:
    changes = 0
    for layer in layers:
        for slot in range(source_LP.shape[1]):
            changes += source_LP[layer, slot] != target_LP[layer, slot]
    return changes


@compiled
def _replicas(slots_P: NDArray[np.int32], num_experts: int) -> tuple[IntArray, IntArray]:
    """The slots of expert 0 in ascending order, then those of expert 1 and so on; and where each
    expert's slots begin, [E + 1].
    """
    # A counting sort. Counts are two places ahead, so that while slots are filled in `first_E[e + 1]`
    # is where the next slot of `e` goes, and in the end it is where those of `e + 1` begin.
    first_E = np.zeros(num_experts + 2, np.int64)
    for expert in slots_P:
        first_E[expert + 2] += 1
    first_E = np.cumsum(first_E)
    slots = np.empty(slots_P.size, np.int64)
    for slot in range(slots_P.size):
        expert = slots_P[slot]
        slots[first_E[expert + 1]] = slot
        first_E[expert + 1] += 1
    return slots, first_E[:-1]
