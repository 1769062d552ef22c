"""Slot alignment: an expert that stays on its rank stays in its slot, so that it need not be moved."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled


def align(
    target_slots: NDArray[np.int32], current_slots: NDArray[np.int32], num_ranks: int
) -> NDArray[np.int32]:
    """`target_slots` permuted within each rank, so that as many as possible equal `current_slots`.

    target_slots: int32 [..., P]. The expert in each slot; those that arrive fill the slots that are
        left over, in this order.
    current_slots: int32, of the same shape.

    Raises ValueError if the shapes differ or the slots do not divide evenly among the ranks.
    """
    if target_slots.shape != current_slots.shape or target_slots.shape[-1] % num_ranks:
        raise ValueError(
            f"cannot align slots {target_slots.shape} with {current_slots.shape} on {num_ranks} ranks"
        )
    slots_per_rank = target_slots.shape[-1] // num_ranks
    target_NS = np.array(target_slots, dtype=np.int32).reshape(-1, slots_per_rank)
    current_NS = np.array(current_slots, dtype=np.int32).reshape(-1, slots_per_rank)
    return _align_ranks(target_NS, current_NS).reshape(target_slots.shape)


@compiled
def _align_ranks(target_NS: NDArray[np.int32], current_NS: NDArray[np.int32]) -> NDArray[np.int32]:
    """N is the ranks of all layers: one row for each rank in each layer."""
    aligned_NS = np.full_like(target_NS, -1)
    for row in range(target_NS.shape[0]):
        _align_rank(target_NS[row], current_NS[row], aligned_NS[row])
    return aligned_NS


@compiled
def _align_rank(
    target_S: NDArray[np.int32], current_S: NDArray[np.int32], aligned_S: NDArray[np.int32]
) -> None:
    stays_S = np.zeros(target_S.size, np.bool_)
    for index in range(target_S.size):
        for slot in range(current_S.size):
            if target_S[index] == current_S[slot] and aligned_S[slot] < 0:
                aligned_S[slot] = target_S[index]
                stays_S[index] = True
                break
    slot = 0
    for index in range(target_S.size):
        if not stays_S[index]:
            while aligned_S[slot] >= 0:
                slot += 1
            aligned_S[slot] = target_S[index]
