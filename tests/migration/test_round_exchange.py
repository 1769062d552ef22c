"""Whole migrations over gloo: experts arrive bit for bit, or every rank votes that they did not."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from migration_rig import Rig
from mixed_layers import loaded_mixed
from ranks import Ranks

from ep_rebalance.migration import schedule
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.itinerary import CHECKSUM_BYTES
from ep_rebalance.migration.round_exchange import Faults, RoundExchange, StagingFull
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_schedule")

DTYPES = [torch.float32, torch.bfloat16]


def migrate_whole(rank, size, seeds, dtype, max_bytes):
    return [migrate_once(rank, size, seed, dtype, max_bytes) for seed in seeds]


def migrate_once(rank, size, seed, dtype, max_bytes):
    rig = Rig(rank, size, seed=seed, dtype=dtype, max_bytes=max_bytes)
    votes = rig.migrate()
    assert rig.served.placement == rig.target
    return rig.wrong_slots(rig.target), any(votes), rig.migration.num_moves


@pytest.mark.parametrize("max_bytes", [256, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 4])
def test_after_a_migration_every_slot_holds_the_targets_expert(
    ranks_of: dict[int, Ranks], size, dtype, max_bytes
):
    answers = ranks_of[size].run(migrate_whole, size, range(6), dtype, max_bytes)
    for migrations in answers:
        assert all(wrong == [] and not faults for wrong, faults, _ in migrations)
    assert sum(moves for _, _, moves in answers[0]) > 10


def migrate_mixed(rank, size, seeds, max_bytes):
    outcomes = []
    for seed in seeds:
        rig = Rig(rank, size, seed=seed, max_bytes=max_bytes, load=loaded_mixed)
        votes = rig.migrate()
        kinds = len(set(rig.memory.expert_bytes_L))
        outcomes.append((rig.wrong_slots(rig.target), any(votes), rig.migration.num_moves, kinds))
    return outcomes


@pytest.mark.parametrize("max_bytes", [64, 256, 1 << 20])
def test_layers_that_are_quantised_in_different_ways_arrive_bit_for_bit(
    two_ranks: Ranks, max_bytes
):
    answers = two_ranks.run(migrate_mixed, 2, range(8), max_bytes)
    for migrations in answers:
        assert all(wrong == [] and not faults for wrong, faults, _, _ in migrations)
    assert sum(moves for _, _, moves, _ in answers[0]) > 10
    assert max(kinds for _, _, _, kinds in answers[0]) == 3


def rounds_with_bytes(rank, size, seed, max_bytes):
    """(bytes sent, bytes received) of experts by this rank in each round, as cut for the wire."""
    rig = Rig(rank, size, seed=seed, max_bytes=max_bytes)
    wire = []
    for batch in rig.migration.batches:
        sends, receives = batch.itinerary.sends, batch.itinerary.receives
        for number, transfers in enumerate(np.diff(batch.rounds.first_N1).tolist()):
            wire.append((sum(sends.splits(number)), sum(receives.splits(number)), transfers))
    return wire


@pytest.mark.parametrize("max_bytes", [256, 1000])
def test_a_round_sends_and_receives_no_more_than_its_bound(four_ranks: Ranks, max_bytes):
    """Beside the experts' bytes only padding and checksums, both of fixed size, are on the wire."""
    for seed in range(4):
        for wire in four_ranks.run(rounds_with_bytes, 4, seed, max_bytes):
            for sent, received, transfers in wire:
                allowed = max_bytes + 2 * CHECKSUM_BYTES * transfers
                assert max(sent, received) <= allowed


def spoil_staging(rank, size, spoiler):
    """A byte of a staged expert changes on one rank, after the rounds and before the vote."""
    rig = Rig(rank, size, seed=3, max_bytes=1 << 20)
    vote = rig.exchange.vote

    def spoiled_vote(batch):
        if rank == spoiler:
            rig.exchange.staging[0, 5] ^= 1
        return vote(batch)

    rig.exchange.vote = spoiled_vote
    votes = rig.migrate()
    return votes, rig.served.placement == rig.source, rig.wrong_slots(rig.source)


@pytest.mark.parametrize(("size", "spoiler"), [(2, 0), (2, 1), (4, 3)])
def test_a_byte_that_changes_in_staging_is_voted_down_by_all(
    ranks_of: dict[int, Ranks], size, spoiler
):
    answers = ranks_of[size].run(spoil_staging, size, spoiler)
    assert answers == [([Faults(transport=0, checksum=1)], True, [])] * size


class SpoiltWhileRead(ExpertMemory):
    """The first byte that is read is another one than the one in the slot."""

    def read(self, layer, slot, start, out, checksum=None):
        super().read(layer, slot, start, out, checksum)
        if start == 0:
            out[0] ^= 0x80


def spoil_sender(rank, size):
    rig = Rig(rank, size, seed=3, max_bytes=1 << 20)
    if rank == 0:
        rig.exchange._memory = SpoiltWhileRead(rig.tensors)
    senders = {move.src_rank for batch in rig.migration.batches for move in batch.moves}
    return 0 in senders, rig.migrate(), rig.wrong_slots(rig.source)


@pytest.mark.parametrize("size", [2, 4])
def test_a_sender_that_reads_wrong_bytes_is_voted_down_by_all(ranks_of: dict[int, Ranks], size):
    for sends, votes, wrong in ranks_of[size].run(spoil_sender, size):
        assert sends
        assert votes[-1].checksum >= 1
        assert votes[-1].transport == 0
        assert wrong == []


def fail_to_pack(rank, size, failing):
    rig = Rig(rank, size, seed=3, max_bytes=256)
    if rank == failing:

        def read(*args):
            raise MemoryError("no memory for packing")

        rig.memory.read = read
    return rig.migrate(), rig.served.placement == rig.source, rig.wrong_slots(rig.source)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_cannot_pack_takes_part_and_is_voted_down_by_all(
    ranks_of: dict[int, Ranks], size
):
    answers = ranks_of[size].run(fail_to_pack, size, 1)
    assert answers[1:] == answers[:-1]
    (fault,), kept, wrong = answers[0]
    assert fault.transport == 1
    assert kept
    assert wrong == []


def fail_to_pack_then_migrate(rank, size):
    rig = Rig(rank, size, seed=3, max_bytes=256)
    read = rig.memory.read
    if rank == 0:
        rig.memory.read = None
    failed = rig.migrate()
    rig.memory.read = read
    return failed, rig.migrate(), rig.wrong_slots(rig.target)


def test_the_next_migration_forgets_the_fault(two_ranks: Ranks):
    for failed, votes, wrong in two_ranks.run(fail_to_pack_then_migrate, 2):
        assert failed[-1]
        assert not any(votes)
        assert wrong == []


def overflow(rank, size):
    """The rounds were cut for larger buffers than this exchange has."""
    rig = Rig(rank, size, seed=5, dtype=torch.float64, max_bytes=1 << 20)
    staging = len(rig.exchange.staging)
    small = RoundExchange(
        group=dist.group.WORLD, memory=rig.memory, max_bytes=16, staging_slots=staging
    )
    try:
        small.begin_batch(rig.migration.batches[0])
    except StagingFull as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size", [2, 4])
def test_a_round_that_does_not_fit_is_refused_by_all_ranks_alike(ranks_of: dict[int, Ranks], size):
    texts = ranks_of[size].run(overflow, size)
    assert "does not fit" in texts[0]
    assert set(texts) == {texts[0]}


class NoGroup:
    """Stands for a process group where only the sizes of rounds are looked at."""


@given(
    seed=st.integers(0, 10_000),
    ranks=st.sampled_from([2, 4, 8]),
    max_bytes=st.integers(256, 4096),
    staging=st.integers(8, 64),
    experts=st.lists(st.integers(1, 200), min_size=3, max_size=12),
)
@settings(max_examples=80)
def test_every_round_that_is_scheduled_fits_into_the_buffers(
    monkeypatch_dist, seed, ranks, max_bytes, staging, experts
):
    """Whatever the sizes of experts and staging: the buffers are reserved before any round is known."""
    rng = np.random.default_rng(seed)
    source, target = (
        Placement(np.array([rng.permutation(8 * ranks) for _ in experts]), 8 * ranks, ranks)
        for _ in range(2)
    )
    memory = ExpertMemory([[torch.zeros(8, 16 * size, dtype=torch.uint8)] for size in experts])
    migration = schedule(
        source,
        target,
        target.even_quotas_LP(),
        topology=Topology.single_node(ranks),
        expert_bytes_L=memory.expert_bytes_L,
        pace=Pace.of_bytes(max_bytes),
        staging_slots=staging,
        rank=0,
    )
    monkeypatch_dist(ranks)
    exchange = RoundExchange(
        group=NoGroup(), memory=memory, max_bytes=max_bytes, staging_slots=staging
    )
    for batch in migration.batches:
        exchange.begin_batch(batch)


@pytest.fixture(scope="module")
def monkeypatch_dist():
    """Sets the size of the group that an exchange sees."""
    with pytest.MonkeyPatch.context() as patch:

        def of_size(ranks):
            patch.setattr(dist, "get_rank", lambda group: 0)
            patch.setattr(dist, "get_world_size", lambda group: ranks)

        yield of_size
