"""Quotas: how the tokens of an expert are split over its replicas.

The split that keeps the busiest rank lowest is a linear programme; pouring the load of one
replicated expert after the other over its ranks like water, until nothing changes, reaches its
optimum. (Each pour minimises the sum of squared rank loads over one expert's quotas, and the split
of least squares also has the lowest maximum.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.planning.compiled import compiled

HASH_RANGE = 1 << 16
"""Tokens carry a hash in 0..HASH_RANGE-1; thresholds divide that range."""

_MAX_SWEEPS = 200
_TOLERANCE = 1e-5
"""Change of a rank load in one sweep, as part of the mean rank load, that ends the pouring."""


def split_quotas(
    placement: Placement, load_LE: NDArray[np.floating | np.integer]
) -> NDArray[np.float64]:
    """float64 [L, P], the split of each expert's tokens that keeps the busiest rank lowest.

    Sums to 1 over an expert's slots. An expert without load is split evenly.
    """
    quotas_LP = placement.even_quotas_LP()
    load = np.array(load_LE, dtype=np.float64)
    for layer in range(placement.num_layers):
        slots_P = np.array(placement.slots_LP[layer])
        replicas = placement.replica_slots(layer)
        _pour_layer(load[layer], slots_P, replicas, placement.slots_per_rank, quotas_LP[layer])
    return quotas_LP


@compiled
def _pour_layer(
    load_E: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    replicas: NDArray[np.int32],
    slots_per_rank: int,
    quotas_P: NDArray[np.float64],
) -> None:
    """Improves `quotas_P` in place; `replicas` is what `Placement.replica_slots` returns."""
    num_ranks = slots_P.size // slots_per_rank
    rank_load_R = np.zeros(num_ranks)
    for slot in range(slots_P.size):
        rank_load_R[slot // slots_per_rank] += load_E[slots_P[slot]] * quotas_P[slot]
    smallest_change = _TOLERANCE * rank_load_R.sum() / num_ranks
    for _ in range(_MAX_SWEEPS):
        change = 0.0
        for expert in range(load_E.size):
            if load_E[expert] > 0 and replicas.shape[1] > 1 and replicas[expert, 1] >= 0:
                poured = _pour_expert(
                    load_E[expert], replicas[expert], slots_per_rank, quotas_P, rank_load_R
                )
                change = max(change, poured)
        if change <= smallest_change:
            break


@compiled
def _pour_expert(
    load: float,
    replica_slots: NDArray[np.int32],
    slots_per_rank: int,
    quotas_P: NDArray[np.float64],
    rank_load_R: NDArray[np.float64],
) -> float:
    """Split one expert anew, all other quotas fixed; returns the largest change of a rank's load."""
    count = 0
    while count < replica_slots.size and replica_slots[count] >= 0:
        count += 1
    others = np.empty(count)
    for j in range(count):
        slot = replica_slots[j]
        others[j] = rank_load_R[slot // slots_per_rank] - load * quotas_P[slot]
    level = _water_level(others, load)
    change = 0.0
    for j in range(count):
        slot = replica_slots[j]
        poured = max(level - others[j], 0.0)
        change = max(change, abs(others[j] + poured - rank_load_R[slot // slots_per_rank]))
        quotas_P[slot] = poured / load
        rank_load_R[slot // slots_per_rank] = others[j] + poured
    return change


@compiled
def _water_level(floors: NDArray[np.float64], volume: float) -> float:
    """Height of `volume` poured over `floors`; guessed too high, then without the dry ones."""
    level = np.inf
    while True:
        wet, total = 0, volume
        for floor in floors:
            if floor < level:
                wet += 1
                total += floor
        lowered = total / wet
        if lowered >= level:
            return level
        level = lowered


def dispatch_thresholds(
    placement: Placement, layer: int, quotas_P: NDArray[np.float64], rank: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How source rank `rank` picks replicas: (slots, thresholds), both int32 [E, max_replicas].

    A token of expert `e` with hash `u` in 0..65535 goes to the first replica `j` with `u <
    thresholds[e, j]`. Unused entries have slot -1 and threshold 65536 and are never reached. The
    replica on `rank` itself comes first, as far as its quota allows; the slots receive their quotas
    (to 1/65536 per source rank) summed over all source ranks, each of which is taken to bring the
    same part of every expert's tokens.
    """
    slots = placement.replica_slots(layer)
    share = _source_share(placement, slots, np.asarray(quotas_P, dtype=np.float64), rank)
    thresholds = np.rint(np.cumsum(share, axis=1) * HASH_RANGE).astype(np.int32)
    last_used = (slots >= 0).sum(axis=1, keepdims=True) - 1
    thresholds[np.arange(slots.shape[1]) >= last_used] = HASH_RANGE
    return slots, thresholds


def _source_share(
    placement: Placement, slots: NDArray[np.int32], quotas_P: NDArray[np.float64], rank: int
) -> NDArray[np.float64]:
    """float64 [E, max_replicas], part of the tokens of each expert at `rank` that each replica
    receives.

    A rank keeps what its own replica's quota allows of its tokens. That leaves, over all ranks,
    just as many tokens as the replicas still have capacity for, so the rest is spread in proportion
    to that capacity.
    """
    quota = np.where(slots >= 0, quotas_P[slots], 0.0)
    kept = np.minimum(quota, 1.0 / placement.num_ranks)
    capacity = quota - kept
    total = capacity.sum(axis=1, keepdims=True)
    spread = np.where(total > 0, capacity / np.where(total > 0, total, 1.0), quota)
    is_own = (slots >= 0) & (slots // placement.slots_per_rank == rank)
    own = np.where(is_own, kept * placement.num_ranks, 0.0)
    share: NDArray[np.float64] = own + (1.0 - own.sum(axis=1, keepdims=True)) * spread
    return share
