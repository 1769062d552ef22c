"""Commit: staged experts into their slots, dispatch tables and placement swapped in the same step.

Runs between two forward passes on every rank, in stream order, after all ranks voted that their
experts arrived whole. Until then nothing that the forward pass reads has been touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.migration import Batch, Migration
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import DispatchTables, RoutingTables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """How tokens are to be split over the replicas of a placement.

    quotas_LP: float64 [L, P]. tables: this rank's, of that placement.
    """

    quotas_LP: NDArray[np.float64]
    tables: DispatchTables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Commit:
    """What a batch changes. placement: served from then on. split: the migration's at its end, of which
    the batch's layers are taken.
    """

    batch: Batch
    placement: Placement
    split: Split

    def serves(self, served: Served) -> Served:
        """What is served after it, where `served` was before."""
        return served.with_layers(self.batch.layers, self.placement, self.split.quotas_LP)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedMigration:
    """A migration with all that its commits take. split: of its target; layers whose quotas alone
    change take it up at the end.
    """

    migration: Migration
    commits: tuple[Commit, ...]
    split: Split

    @classmethod
    def of(cls, migration: Migration, counts: RoutingTables) -> PreparedMigration:
        """Takes milliseconds: not for the step path."""
        tables = counts.dispatch_tables(migration.target, migration.quotas_LP)
        split = Split(quotas_LP=migration.quotas_LP, tables=tables)
        commits, placement = [], migration.source
        for batch in migration.batches:
            placement = placement.replaced(batch.layers, migration.target)
            commits.append(Commit(batch=batch, placement=placement, split=split))
        return cls(migration=migration, commits=tuple(commits), split=split)


def commit_batch(
    commit: Commit,
    served: Served,
    *,
    layers: Sequence[int],
    staging: torch.Tensor,
    memory: ExpertMemory,
    counts: RoutingTables,
    rank: int,
) -> Served:
    """Serve the batch's layers anew; returns what is served from now on.

    layers: those of the batch that this rank writes.
    """
    for move in commit.batch.arrivals(rank):
        if move.layer not in layers:
            continue
        packed = staging[move.staging, : memory.expert_bytes_L[move.layer]]
        memory.write(move.layer, move.dst_slot % memory.slots, packed)
    counts.serve(layers, commit.split.tables)
    return commit.serves(served)


def commit_split(split: Split, served: Served, counts: RoutingTables) -> Served:
    """Split tokens anew over the replicas of the placement that is served."""
    counts.split(split.tables)
    return served.with_quotas(split.quotas_LP)
