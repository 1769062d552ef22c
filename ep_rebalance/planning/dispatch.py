"""Dispatch: which replica a token goes to, so that the replicas receive their quotas.

A token stays on its rank if that rank holds the expert, as far as the quota allows; else it goes to
a replica on its node, as far as theirs allow; else to any. Each source rank is taken to bring the
same part of every expert's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.planning.compiled import compiled
from ep_rebalance.topology import Topology

HASH_RANGE = 1 << 16
"""Tokens carry a hash in 0..HASH_RANGE-1; thresholds divide that range."""


def dispatch_thresholds(
    placement: Placement,
    layers: Sequence[int],
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    rank: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How source rank `rank` picks replicas in `layers`: (slots, thresholds), both int32
    [len(layers), E, max_replicas].

    quotas_LP: float64 [L, P], of all layers. A token of expert `e` with hash `u` in 0..65535 goes to
    the first replica `j` with `u < thresholds[e, j]`. Unused entries have slot -1 and threshold 65536
    and are never reached. Over all source ranks the slots receive their quotas, to 1/65536 of each
    rank's tokens.
    """
    slots = np.stack([placement.replica_slots(layer) for layer in layers])
    thresholds = np.full_like(slots, HASH_RANGE)
    node_R = np.array(topology.node_of_rank, dtype=np.int64)
    chosen_LP = np.ascontiguousarray(quotas_LP[list(layers)], dtype=np.float64)
    _set_thresholds(slots, chosen_LP, node_R, placement.slots_per_rank, rank, thresholds)
    return slots, thresholds


@compiled
def _set_thresholds(
    slots: NDArray[np.int32],
    quotas_LP: NDArray[np.float64],
    node_R: NDArray[np.int64],
    slots_per_rank: int,
    rank: int,
    thresholds: NDArray[np.int32],
) -> None:
    for layer in range(slots.shape[0]):
        for expert in range(slots.shape[1]):
            count = 0
            while count < slots.shape[2] and slots[layer, expert, count] >= 0:
                count += 1
            if count < 2:
                continue
            own_slots = slots[layer, expert, :count]
            quota = np.empty(count)
            for j in range(count):
                quota[j] = quotas_LP[layer, own_slots[j]]
            total = np.cumsum(_shares(own_slots // slots_per_rank, quota, node_R, rank))
            for j in range(count - 1):
                thresholds[layer, expert, j] = np.rint(total[j] * HASH_RANGE)


@compiled
def _shares(
    ranks: NDArray[np.int32], quota: NDArray[np.float64], node_R: NDArray[np.int64], rank: int
) -> NDArray[np.float64]:
    """Part of the tokens of one expert at `rank` that each of its replicas receives.

    A rank keeps what its own replica's quota allows. What ranks of a node have left is spread over
    the capacity left on that node, and what is left of that over the capacity left anywhere; both
    add up to the same over all ranks, so every quota is met.
    """
    kept = np.minimum(quota, 1.0 / node_R.size)
    free = quota - kept
    shares = np.zeros(ranks.size)
    left = 1.0
    for j in range(ranks.size):
        if ranks[j] == rank:
            shares[j] = kept[j] * node_R.size
            left = 1.0 - shares[j]
    still_free = np.empty(ranks.size)
    near = 0.0
    for j in range(ranks.size):
        part = _near_part(ranks, kept, free, node_R, node_R[ranks[j]])
        still_free[j] = free[j] * (1.0 - part[0])
        if node_R[ranks[j]] == node_R[rank]:
            shares[j] += left * part[1] * free[j]
            near += left * part[1] * free[j]
    anywhere = still_free.sum()
    if anywhere > 1e-12:
        shares += (left - near) * still_free / anywhere
    elif near < left:
        shares += (left - near) * quota
    return shares


@compiled
def _near_part(
    ranks: NDArray[np.int32],
    kept: NDArray[np.float64],
    free: NDArray[np.float64],
    node_R: NDArray[np.int64],
    node: int,
) -> tuple[float, float]:
    """Part of a node's free capacity that the node itself takes, and part of its ranks' tokens that
    finds room there, for each unit of free capacity."""
    demand, capacity = np.sum(node_R == node) / node_R.size, 0.0
    for j in range(ranks.size):
        if node_R[ranks[j]] == node:
            demand -= kept[j]
            capacity += free[j]
    flow = min(demand, capacity)
    if flow <= 1e-12:
        return 0.0, 0.0
    return flow / capacity, flow / demand / capacity
