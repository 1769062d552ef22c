"""Commit: staged experts into slots, tables of whole layers swapped, nothing else touched."""

import numpy as np
import pytest
import torch
from expert_weights import loaded, memory_of, wrong_slots
from step_path import DEVICE, recording_waits

from ep_rebalance.migration import Batch, Migration, schedule
from ep_rebalance.migration.commit import PreparedMigration, Split, commit_batch, commit_split
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.routing.thresholds import dispatch_thresholds
from ep_rebalance.topology import Topology

DTYPE = torch.float32
SOURCE = Placement(np.array([[0, 1, 2, 3, 0, 1]] * 3), 4, 2)
TARGET = Placement(np.array([[0, 1, 2, 3, 0, 1], [3, 1, 2, 0, 3, 1], [0, 1, 3, 2, 0, 1]]), 4, 2)
QUOTAS_LP = np.array([[0.25, 0.5, 1, 1, 0.75, 0.5], [0.1, 0.5, 1, 1, 0.9, 0.5], [0.5] * 6])

TOPOLOGY = Topology.single_node(2)


class Rig:
    """One rank with loaded weights."""

    def __init__(self, rank: int, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.tensors = loaded(SOURCE, rank, DTYPE, device=device)
        self.memory = memory_of(self.tensors)
        self.counts = RoutingTables(
            placement=SOURCE,
            max_tokens=4,
            device=torch.device(device),
            topology=TOPOLOGY,
            rank=rank,
        )
        self.served = Served.initial(SOURCE)
        self.counts.set_dispatch((0, 1, 2), SOURCE, self.served.quotas_LP)
        self.migration = migration_of(self.memory.expert_bytes_L)
        self.prepared = PreparedMigration.of(self.migration, self.counts)
        self.staging = torch.zeros(
            3, max(self.memory.expert_bytes_L), dtype=torch.uint8, device=device
        )

    def stage(self, batch: Batch) -> None:
        """Fill the staging memory as if the rounds had been exchanged."""
        for move in batch.arrivals(self.rank):
            sender = memory_of(loaded(SOURCE, move.src_rank, DTYPE))
            size = self.memory.expert_bytes_L[move.layer]
            local = move.src_slot % SOURCE.slots_per_rank
            sender.read(move.layer, local, 0, self.staging[move.staging, :size])

    def commit(self, index: int) -> None:
        self.stage(self.migration.batches[index])
        self.commit_staged(index)

    def commit_staged(self, index: int) -> None:
        commit = self.prepared.commits[index]
        self.served = commit_batch(
            commit,
            self.served,
            layers=commit.batch.layers,
            staging=self.staging,
            memory=self.memory,
            counts=self.counts,
            rank=self.rank,
        )

    def commit_quotas(self) -> None:
        self.served = commit_split(self.prepared.split, self.served, self.counts)

    def check_serves(self, placement: Placement) -> None:
        assert self.served.placement == placement
        assert wrong_slots(self.tensors, placement, self.rank, DTYPE) == []
        slots, thresholds = dispatch_thresholds(
            placement,
            range(placement.num_layers),
            self.served.quotas_LP,
            topology=TOPOLOGY,
            rank=self.rank,
        )
        for layer, tables in enumerate(self.counts.layers):
            assert (tables.replica_slots_EC.numpy() == slots[layer]).all()
            assert (tables.thresholds_EC.numpy() == thresholds[layer]).all()


def migration_of(expert_bytes_L) -> Migration:
    return schedule(
        SOURCE,
        TARGET,
        QUOTAS_LP,
        topology=TOPOLOGY,
        expert_bytes_L=expert_bytes_L,
        pace=Pace.of_bytes(1 << 20),
        staging_slots=2,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_each_batch_serves_its_layers_and_leaves_the_others(rank):
    rig = Rig(rank)
    rig.check_serves(SOURCE)
    assert [batch.layers for batch in rig.migration.batches] == [(1,), (2,)]
    rig.commit(0)
    rig.check_serves(SOURCE.replaced([1], TARGET))
    assert (rig.served.quotas_LP[1] == QUOTAS_LP[1]).all()
    assert (rig.served.quotas_LP[[0, 2]] == SOURCE.even_quotas_LP()[[0, 2]]).all()
    rig.commit(1)
    rig.check_serves(TARGET)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_a_migration_changes_the_quotas_of_the_layers_that_did_not_move(rank):
    rig = Rig(rank)
    rig.commit(0)
    rig.commit(1)
    assert (rig.served.quotas_LP[0] == SOURCE.even_quotas_LP()[0]).all()
    rig.commit_quotas()
    rig.check_serves(TARGET)
    assert (rig.served.quotas_LP == QUOTAS_LP).all()


def test_quotas_that_were_refreshed_after_preparing_stay_until_their_layer_moves():
    rig = Rig(0)
    refreshed = SOURCE.even_quotas_LP()
    refreshed[2] = [0.2, 0.5, 1, 1, 0.8, 0.5]
    tables = rig.counts.dispatch_tables(SOURCE, refreshed)
    rig.served = commit_split(Split(quotas_LP=refreshed, tables=tables), rig.served, rig.counts)
    rig.commit(0)
    assert (rig.served.quotas_LP[2] == refreshed[2]).all()
    rig.check_serves(SOURCE.replaced([1], TARGET))


def test_what_was_served_before_is_not_changed_in_place():
    rig = Rig(0)
    before, quotas_LP = rig.served, rig.served.quotas_LP.copy()
    rig.commit(0)
    assert before.placement == SOURCE
    assert (before.quotas_LP == quotas_LP).all()


def test_a_commit_of_some_layers_leaves_the_generation_to_the_whole_migration():
    rig = Rig(0)
    rig.commit(0)
    assert rig.served.generation == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_of_a_commit_waits_for_the_device(rank):
    with recording_waits() as waits:
        rig = Rig(rank, DEVICE)
        waits.clear()
        rig.commit_staged(0)
        rig.commit_staged(1)
        rig.commit_quotas()
    assert waits == []
    assert rig.served.placement == TARGET
