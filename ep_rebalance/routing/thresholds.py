"""Dispatch: which replica a token goes to, so that the replicas receive their quotas.

Tokens come from a *source*: a rank, or the ranks that route the same tokens and must split them alike.
As far as quotas allow, a token stays in its source if a rank there holds the expert. Otherwise it goes
to a replica in the *vicinity*, again as far as quotas allow, and otherwise to any replica. The vicinity
is the node of the source; nodes that a source spans count as one, together with all nodes that are
joined to them in this way. Every source is assumed to bring the same share of every expert's tokens.

Letters of this module: `N` nodes; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology

HASH_RANGE = 1 << 16
"""Tokens have a hash in 0..HASH_RANGE-1, and thresholds divide that range."""
HASH_STRIDE = 20_011
"""Added to the hash offset in each step. It is coprime to 65536, so that every offset comes up."""


def dispatch_thresholds(
    placement: Placement,
    layers: Sequence[int],
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    rank: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(slots, thresholds), how `rank` picks replicas in `layers`; the same for all ranks of a source.

    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives, in all layers.

    Both are int32 [len(layers), E, max_replicas]. A token of expert `e` with hash `u` in 0..65535 goes
    to the first replica `j` with `u < thresholds[e, j]`. Unused entries have slot -1 and threshold
    65536, and are never reached. Over all sources the slots receive their quotas, to within 1/65536 of
    each source's tokens.
    """
    chosen = list(layers)
    shape = len(chosen), placement.num_experts, placement.max_replicas
    slots = np.full(shape, -1, dtype=np.int32)
    thresholds = np.full(shape, HASH_RANGE, dtype=np.int32)
    _set_slots(placement.slots_LP[chosen], slots)
    if not placement.num_redundant:
        return slots, thresholds  # each expert has its one slot, and ranks may have unequally many
    source_R = np.array(topology.source_of_rank, dtype=np.int64)
    _set_thresholds(
        slots,
        np.ascontiguousarray(quotas_LP[chosen], dtype=np.float64),
        source_R,
        _vicinity_R(topology),
        placement.slots_per_rank,
        source_R[rank],
        thresholds,
    )
    return slots, thresholds


def _vicinity_R(topology: Topology) -> NDArray[np.int64]:
    """int64 [R], the node of each rank, or the first of the nodes that sources join to it."""
    nodes, size = topology.node_of_rank, topology.ranks_per_source
    vicinity_N = np.arange(topology.num_nodes)
    for spanned in {tuple(set(nodes[i : i + size])) for i in range(0, len(nodes), size)}:
        if len(spanned) > 1:
            joined = vicinity_N[list(spanned)]
            vicinity_N[np.isin(vicinity_N, joined)] = joined.min()
    return vicinity_N[list(nodes)]


@compiled
def _set_slots(slots_LP: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
    """Fill `slots` with `Placement.replica_slots` of every layer."""
    for layer in range(slots_LP.shape[0]):
        count_E = np.zeros(slots.shape[1], np.int64)
        for slot in range(slots_LP.shape[1]):
            expert = slots_LP[layer, slot]
            slots[layer, expert, count_E[expert]] = slot
            count_E[expert] += 1


@compiled
def _set_thresholds(
    slots: NDArray[np.int32],
    quotas_LP: NDArray[np.float64],
    source_R: NDArray[np.int64],
    vicinity_R: NDArray[np.int64],
    slots_per_rank: int,
    source: int,
    thresholds: NDArray[np.int32],
) -> None:
    scratch = _scratch(source_R, vicinity_R)
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
            ranks = own_slots // slots_per_rank
            total = np.cumsum(_shares(ranks, quota, source_R, vicinity_R, source, scratch))
            # thresholds[j] = 65536 (shares[0] + ... + shares[j]); the last one stays 65536 exactly.
            for j in range(count - 1):
                thresholds[layer, expert, j] = np.rint(total[j] * HASH_RANGE)


class _Scratch(NamedTuple):
    """Sums over the replicas of one expert, so that these need not be compared with each other.

    room_R: float64 [R], of which each source has the entry of its number. Always left at 0.
    part_N: float64 [N]. The part of all tokens that each vicinity's sources bring.
    demand_N, capacity_N: float64 [N]. For `_set_vicinities`.
    """

    room_R: NDArray[np.float64]
    part_N: NDArray[np.float64]
    demand_N: NDArray[np.float64]
    capacity_N: NDArray[np.float64]


@compiled
def _scratch(source_R: NDArray[np.int64], vicinity_R: NDArray[np.int64]) -> _Scratch:
    nodes = vicinity_R.max() + 1
    ranks_N = np.zeros(nodes, np.int64)
    for vicinity in vicinity_R:
        ranks_N[vicinity] += 1
    return _Scratch(
        np.zeros(source_R.size), ranks_N / vicinity_R.size, np.zeros(nodes), np.zeros(nodes)
    )


@compiled
def _shares(
    ranks: NDArray[np.int32],
    quota: NDArray[np.float64],
    source_R: NDArray[np.int64],
    vicinity_R: NDArray[np.int64],
    source: int,
    scratch: _Scratch,
) -> NDArray[np.float64]:
    """float64 [C], the share of one expert's tokens at `source` that each replica receives.

    ranks: int32 [C]. The rank of each replica.
    quota: float64 [C]. The share of all tokens of the expert that each replica receives.

    A source keeps what the quotas of its own replicas allow. What the sources of a vicinity have left
    is spread over the capacity that is left there, and what then remains over the capacity that is left
    anywhere. Tokens left and capacity left are equal when summed over all sources, so every quota is
    met.
    """
    # A source brings 1 / num_sources of all tokens, so `kept` of all is kept * num_sources of its own.
    num_sources = source_R[-1] + 1
    kept = _kept(quota, source_R[ranks], num_sources, scratch.room_R)
    free = quota - kept
    shares = np.zeros(ranks.size)
    for j in range(ranks.size):
        if source_R[ranks[j]] == source:
            shares[j] = kept[j] * num_sources
    left = 1.0 - shares.sum()
    vicinity = vicinity_R[np.searchsorted(source_R, source)]
    _set_vicinities(vicinity_R[ranks], kept, free, scratch)
    still_free = np.empty(ranks.size)
    near = 0.0
    for j in range(ranks.size):
        part = _near_part(scratch, vicinity_R[ranks[j]])
        still_free[j] = free[j] * (1.0 - part[0])
        if vicinity_R[ranks[j]] == vicinity:
            shares[j] += left * part[1] * free[j]
            near += left * part[1] * free[j]
    anywhere = still_free.sum()
    if anywhere > 1e-12:
        shares += (left - near) * still_free / anywhere
    elif near < left:
        shares += (left - near) * quota
    return shares


@compiled
def _kept(
    quota: NDArray[np.float64],
    sources: NDArray[np.int64],
    num_sources: int,
    room_R: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [C], the share of all tokens that each replica receives from its own source.

    sources: int64 [C]. The source in which each replica is.
    """
    # min(room, 1 / num_sources) for the replicas of a source together, divided by their quotas; `room`
    # is the sum of these.
    kept = np.zeros(quota.size)
    for j in range(quota.size):
        room_R[sources[j]] += quota[j]
    for j in range(quota.size):
        room = room_R[sources[j]]
        if room > 0.0:
            kept[j] = min(room, 1.0 / num_sources) * (quota[j] / room)
    room_R[sources] = 0.0
    return kept


@compiled
def _set_vicinities(
    vicinities: NDArray[np.int64],
    kept: NDArray[np.float64],
    free: NDArray[np.float64],
    scratch: _Scratch,
) -> None:
    """Set demand and capacity of each vicinity with replicas.

    demand: what its sources have left, of all tokens; they bring in proportion to its ranks. capacity: what
        is left of the quotas there.

    vicinities: int64 [C]. Of each replica.
    kept, free: float64 [C]. What each replica receives from its own source, and what is left of its
        quota.
    """
    _, part_N, demand_N, capacity_N = scratch
    for vicinity in vicinities:
        demand_N[vicinity], capacity_N[vicinity] = part_N[vicinity], 0.0
    for j in range(vicinities.size):
        demand_N[vicinities[j]] -= kept[j]
        capacity_N[vicinities[j]] += free[j]


@compiled
def _near_part(scratch: _Scratch, vicinity: int) -> tuple[float, float]:
    """(flow / capacity, flow / demand / capacity) of a vicinity: the fraction of its free capacity that its
    own sources fill, and the share of their remaining tokens that each unit of that capacity gets.
    """
    demand, capacity = scratch.demand_N[vicinity], scratch.capacity_N[vicinity]
    flow = min(demand, capacity)
    if flow <= 1e-12:
        return 0.0, 0.0
    return flow / capacity, flow / demand / capacity
