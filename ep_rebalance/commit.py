"""Commit: staged experts into their slots, dispatch tables and placement swapped in the same step.

Runs between two forward passes on every rank, in stream order, after all ranks voted that their
experts arrived whole. Until then nothing that the forward pass reads has been touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.counts import DeviceCounts
from ep_rebalance.migration import Batch, Migration
from ep_rebalance.placement import Placement
from ep_rebalance.transport.expert_memory import ExpertMemory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """What the forward pass runs on: a placement, the quotas of its replicas, and its number.

    quotas_LP: float64 [L, P].
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    generation: int

    @classmethod
    def initial(cls, placement: Placement) -> Served:
        return cls(placement=placement, quotas_LP=placement.even_quotas_LP(), generation=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """How tokens are to be split over the replicas of a placement.

    quotas_LP: float64 [L, P]. thresholds_LEC: int32 [L, E, C], this rank's, as of `DeviceCounts`.
    """

    quotas_LP: NDArray[np.float64]
    thresholds_LEC: NDArray[np.int32]


def commit_batch(
    batch: Batch,
    migration: Migration,
    served: Served,
    *,
    staging: torch.Tensor,
    memory: ExpertMemory,
    counts: DeviceCounts,
    rank: int,
) -> Served:
    """Serve the batch's layers from the migration's target; returns what is served from now on."""
    for move in batch.arrivals(rank):
        packed = staging[move.staging, : memory.expert_bytes_L[move.layer]]
        memory.write(move.layer, move.dst_slot % memory.slots, packed)
    return commit_tables(batch.layers, migration.target, migration.quotas_LP, served, counts)


def commit_tables(
    layers: tuple[int, ...],
    target: Placement,
    quotas_LP: NDArray[np.float64],
    served: Served,
    counts: DeviceCounts,
) -> Served:
    """Swap the dispatch tables of `layers`; their slots must hold the target's experts already."""
    quotas = served.quotas_LP.copy()
    quotas[list(layers)] = quotas_LP[list(layers)]
    counts.set_dispatch(layers, target, quotas_LP)
    return Served(
        placement=served.placement.replaced(layers, target),
        quotas_LP=quotas,
        generation=served.generation,
    )


def commit_split(split: Split, served: Served, counts: DeviceCounts) -> Served:
    """Split tokens anew over the replicas of the placement that is served."""
    counts.set_thresholds(split.thresholds_LEC)
    return replace(served, quotas_LP=split.quotas_LP)
