"""Commit: staged experts enter their slots, and dispatch tables and placement change in the same step.

It runs on every rank between two forward passes, in stream order, after all ranks voted that their
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

    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives.
    tables: this rank's, with these quotas.
    """

    quotas_LP: NDArray[np.float64]
    tables: DispatchTables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Commit:
    """What a batch changes.

    placement: of all layers, served from then on.
    split: the migration's; the batch's layers take up their part of it.
    """

    batch: Batch
    placement: Placement
    split: Split

    def serves(self, served: Served) -> Served:
        """What is served after the commit.

        served: before it.
        """
        return served.with_layers(self.batch.layers, self.placement, self.split.quotas_LP)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedMigration:
    """A migration, and everything that its commits need.

    commits: one for each batch.
    split: of the target placement; layers whose experts stay take it up at the end.
    """

    migration: Migration
    commits: tuple[Commit, ...]
    split: Split

    @classmethod
    def of(cls, migration: Migration, counts: RoutingTables) -> PreparedMigration:
        """Prepare the commits of a migration. It takes milliseconds: not for the step path."""
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
    """Put a batch's experts into their slots. Returns what is served from now on.

    served: so far.
    layers: those of the batch that this rank writes.
    staging: uint8, a packed expert in each row. What arrived.
    """
    # The next forward pass is queued behind these copies, so it sees all of them or none.
    write_arrivals(commit.batch, layers, staging, memory, rank)
    counts.serve(layers, commit.split.tables)
    return commit.serves(served)


def write_arrivals(
    batch: Batch, layers: Sequence[int], staging: torch.Tensor, memory: ExpertMemory, rank: int
) -> None:
    """Put experts that arrived into their slots; arguments as of `commit_batch`."""
    for move in batch.arrivals(rank):
        if move.layer in layers:
            packed = staging[move.staging, : memory.expert_bytes_L[move.layer]]
            memory.write(move.layer, move.dst_slot % memory.slots, packed)


def commit_split(split: Split, served: Served, counts: RoutingTables) -> Served:
    """Split tokens anew over the replicas of the placement that is served. Returns what is served now."""
    counts.split(split.tables)
    return served.with_quotas(split.quotas_LP)
