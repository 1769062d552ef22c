"""Migrations on gloo ranks, step by step, without the loop that decides on them."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from expert_weights import loaded, memory_of, wrong_slots
from ranks import Ranks

from ep_rebalance.balancer import migrator
from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.config_sources import load_config
from ep_rebalance.migration import schedule
from ep_rebalance.migration.commit import PreparedMigration
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.journal import Journal, initial_status
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_schedule")

DTYPE = torch.float32
SHAPES = ((30, 20), (20, 11), (7,))
STAY, MOVE = [0, 1, 2, 3, 0, 1], [0, 1, 3, 2, 0, 1]
SOURCE = Placement(np.array([STAY] * 4), 4, 2)
TARGET = Placement(np.array([MOVE, STAY, MOVE, MOVE]), 4, 2)
ON_THE_WAY = [SOURCE, SOURCE.replaced([0], TARGET), SOURCE.replaced([0, 2], TARGET), TARGET]
"""Layers are whole one after the other."""
QUOTAS_LP = SOURCE.even_quotas_LP()
QUOTAS_LP[1] = [0.25, 0.5, 1, 1, 0.75, 0.5]
CONFIG = load_config(
    {
        "planner": {"max_arrivals_per_rank_and_layer": 1},
        "migration": {"max_bytes_per_step": 4096},
    }
)


class Rig:
    """One rank with loaded weights and a migrator."""

    def __init__(self, rank: int, *, moves: bool = True) -> None:
        self.rank = rank
        self.tensors = loaded(SOURCE, rank, DTYPE, SHAPES)
        self.status = initial_status(config=CONFIG, model="m", placement=SOURCE, top_k=2)
        self.counts = RoutingTables(
            placement=SOURCE,
            max_tokens=4,
            device=torch.device("cpu"),
            topology=Topology.single_node(2),
            rank=rank,
        )
        self.migrator = Migrator(
            config=CONFIG,
            placement=SOURCE,
            counts=self.counts,
            memory=memory_of(self.tensors) if moves else None,
            group=dist.group.WORLD,
            topology=Topology.single_node(2),
            tell=Journal(self.status, contiguous=SOURCE, top_k=2, rank=rank).apply,
        )

    def prepared(self, target: Placement) -> PreparedMigration:
        migration = schedule(
            SOURCE,
            target,
            QUOTAS_LP,
            topology=Topology.single_node(2),
            expert_bytes_L=self.migrator.expert_bytes_L,
            pace=Pace.of_bytes(CONFIG.migration.max_bytes_per_step),
            staging_slots=self.migrator.staging_slots,
            rank=self.rank,
        )
        return PreparedMigration.of(migration, self.counts)

    def migrate(self, target: Placement) -> "Outcome":
        prepared = self.prepared(target)
        steps, seen = self.migrator.migrate(prepared), []
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return self.outcome(seen, end.value.fault, prepared.migration.num_steps)
            seen.append(self.migrator.served.placement)

    def outcome(self, seen=(), fault: str = "", num_steps: int = 0) -> "Outcome":
        placement = self.migrator.served.placement
        assert wrong_slots(self.tensors, placement, self.rank, DTYPE, SHAPES) == []
        return Outcome(
            list(seen), fault, num_steps, self.migrator.served, self.migrator.take_actions()
        )


@dataclass(frozen=True)
class Outcome:
    """What was served at the end of each step, and what came of the migration."""

    seen: list[Placement]
    fault: str
    num_steps: int
    served: Served
    actions: int


def migrate(rank, target):
    return Rig(rank).migrate(target)


def test_a_migration_takes_a_step_for_each_round(two_ranks: Ranks):
    for outcome in two_ranks.run(migrate, TARGET):
        assert outcome.fault == ""
        assert len(outcome.seen) == outcome.num_steps
        assert outcome.actions == outcome.num_steps + 3  # and three commits
        assert outcome.num_steps > 3
        assert outcome.served.placement == TARGET
        assert (outcome.served.quotas_LP == QUOTAS_LP).all()
        assert outcome.served.generation == 1


def test_a_batch_is_served_while_the_next_one_moves(two_ranks: Ranks):
    ours, theirs = two_ranks.run(migrate, TARGET)
    assert ours.seen == theirs.seen
    order = [ON_THE_WAY.index(placement) for placement in ours.seen]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}  # the last layer is committed after the last round's step
    assert ours.served.placement == TARGET


def test_quotas_alone_take_no_step_and_no_generation(two_ranks: Ranks):
    for outcome in two_ranks.run(migrate, SOURCE):
        assert (outcome.num_steps, outcome.seen, outcome.actions) == (0, [], 0)
        assert outcome.served.placement == SOURCE
        assert (outcome.served.quotas_LP == QUOTAS_LP).all()
        assert outcome.served.generation == 0


def damage_the_second_batch(patch, rank):
    """One byte in the staging of rank 1 changes before the vote on it."""
    votes, vote = [], RoundExchange.vote

    def damaged_vote(exchange, batch, **told):
        votes.append(batch)
        if rank == 1 and len(votes) == 2:
            exchange.staging[batch.arrivals(rank)[0].staging, 5] ^= 1
        return vote(exchange, batch, **told)

    patch.setattr(RoundExchange, "vote", damaged_vote)


def migrate_with_a_damaged_batch(rank):
    rig = Rig(rank)
    with pytest.MonkeyPatch.context() as patch:
        damage_the_second_batch(patch, rank)
        return rig.migrate(TARGET)


def test_a_damaged_batch_ends_the_migration_after_the_batches_before_it(two_ranks: Ranks):
    for outcome in two_ranks.run(migrate_with_a_damaged_batch):
        assert "1 with a checksum error" in outcome.fault
        assert outcome.served.placement == ON_THE_WAY[1]
        assert (outcome.served.quotas_LP == SOURCE.even_quotas_LP()).all()
        assert outcome.served.generation == 1


def restore(rank):
    rig = Rig(rank)
    rig.migrator.restore(TARGET, QUOTAS_LP, 7)
    return rig.outcome(), rig.status.generation


def test_a_saved_placement_is_restored_with_its_quotas_and_number(two_ranks: Ranks):
    for outcome, generation in two_ranks.run(restore):
        assert outcome.served.placement == TARGET
        assert (outcome.served.quotas_LP == QUOTAS_LP).all()
        assert outcome.served.generation == generation == 7


def restore_what_one_rank_cannot_send(rank):
    rig = Rig(rank)
    if rank == 0:
        rig.migrator._memory.read = None
    with pytest.raises(RuntimeError) as raised:
        rig.migrator.restore(TARGET, QUOTAS_LP, 7)
    return str(raised.value), rig.outcome()


def test_what_cannot_be_restored_is_refused_on_all_ranks(two_ranks: Ranks):
    for text, outcome in two_ranks.run(restore_what_one_rank_cannot_send):
        assert "could not be taken up: 1 rank(s) with a transport error" in text
        assert outcome.served.placement == SOURCE
        assert outcome.served.generation == 0


def restore_with_a_damaged_batch(rank):
    """Staging is as large as a rank, so that one batch would hold all: here it holds two experts."""
    rig = Rig(rank)
    with pytest.MonkeyPatch.context() as patch:
        damage_the_second_batch(patch, rank)
        patch.setattr(migrator, "schedule", partial(schedule_in_batches, migrator.schedule))
        with pytest.raises(RuntimeError):
            rig.migrator.restore(TARGET, QUOTAS_LP, 7)
    return rig.outcome(), rig.status.generation


def schedule_in_batches(schedule, *args, staging_slots, **kwargs):
    return schedule(*args, staging_slots=2, **kwargs)


def test_what_was_restored_before_a_fault_has_a_generation_of_its_own(two_ranks: Ranks):
    for outcome, shown in two_ranks.run(restore_with_a_damaged_batch):
        assert outcome.served.placement == ON_THE_WAY[2]
        assert outcome.served.generation == shown == 1


def observe(rank):
    rig = Rig(rank, moves=False)
    return rig.migrator.served, rig.migrator.expert_bytes_L


def test_without_expert_memory_the_loaded_placement_is_served(two_ranks: Ranks):
    for served, expert_bytes_L in two_ranks.run(observe):
        assert served.placement == SOURCE
        assert expert_bytes_L == ()
