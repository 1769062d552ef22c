from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from schedule_reference import plain, schedule_reference, transfers_by_round
from schedules import scheduled, settings_of_a_schedule, weights_of
from shapes import random_slots

from ep_rebalance.compiled import Compiled
from ep_rebalance.migration import Migration, Move, compile_schedule, schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.topology import LINKS, Topology

COMPILED = [
    "ep_rebalance.planning.sources",
    *(f"ep_rebalance.migration.{name}" for name in ("itinerary", "rounds", "schedule")),
]


def migrations() -> st.SearchStrategy[Migration]:
    return settings_of_a_schedule().map(scheduled)


@given(settings_of_a_schedule())
@settings(max_examples=200)
def test_compiled_gives_what_plain_python_gives(arguments: dict[str, Any]) -> None:
    assert plain(scheduled(arguments)) == schedule_reference(**arguments)


def test_compiled_gives_what_plain_python_gives_over_many_rounds() -> None:
    """More rounds and transfers than the compiled form makes room for at first."""
    generator = np.random.default_rng(3)
    source, target = (
        Placement(np.array([random_slots(generator, 8, 9, 64) for _ in range(3)]), 64, 8)
        for _ in range(2)
    )
    arguments = {
        "source": source,
        "target": target,
        "topology": Topology(node_of_rank=(0, 0, 0, 0, 1, 1, 1, 1)),
        "expert_bytes_L": [70_000, 90_016, 50_000],
        "pace": Pace(max_bytes=2000, max_internode_bytes=700, layers=(2, 0)),
        "staging_slots": 18,
    }
    migration = scheduled(arguments)
    assert migration.num_rounds > 300
    assert plain(migration) == schedule_reference(**arguments)


def moves_of(migration: Migration) -> list[Move]:
    return [move for batch in migration.batches for move in batch.moves]


def sizes_L(migration: Migration) -> list[int]:
    """The size of an expert of each layer, as far as the moves tell."""
    sizes = [1] * migration.source.num_layers
    for batch in migration.batches:
        for layer, size in zip(batch.moves.layer, batch.moves.size, strict=True):
            sizes[layer] = int(size)
    return sizes


@given(migrations())
@settings(max_examples=150)
def test_every_byte_gets_from_source_to_target(migration: Migration) -> None:
    """Each batch finds its experts whole in the staging memory, whatever else arrives there."""
    source, target = migration.source, migration.target
    sizes, moves = sizes_L(migration), moves_of(migration)
    weights = weights_of(source, sizes)
    staged: dict[tuple[int, int], NDArray[np.uint8]] = {}
    received = [0] * len(moves)
    for batch in migration.batches:
        for transfers in transfers_by_round(batch):
            assert transfers
            for number, start, stop in transfers:
                move = moves[number]
                assert start == received[number] < stop
                received[number] = stop
                expert = weights[move.layer][move.src_slot]
                if start == 0:
                    staged[move.dst_rank, move.staging] = np.zeros_like(expert)
                staged[move.dst_rank, move.staging][start:stop] = expert[start:stop]
        for move in batch.moves:
            weights[move.layer][move.dst_slot] = staged.pop((move.dst_rank, move.staging))
    assert not staged
    assert received == [sizes[move.layer] for move in moves]
    assert all(map(np.array_equal, weights, weights_of(target, sizes)))
    assert migration.num_moves == source.changed_slots(target)


@given(migrations())
@settings(max_examples=50)
def test_moves_say_where_from_and_where_to(migration: Migration) -> None:
    source, target = migration.source, migration.target
    layers = [layer for batch in migration.batches for layer in batch.layers]
    changed = np.flatnonzero((source.slots_LP != target.slots_LP).any(axis=1)).tolist()
    first = [layer for layer in migration.pace.layers if layer in changed]
    assert layers == first + [layer for layer in changed if layer not in first]
    for batch in migration.batches:
        for move in batch.moves:
            assert move.layer in batch.layers
            assert source.slots_LP[move.layer, move.src_slot] == move.expert
            assert target.slots_LP[move.layer, move.dst_slot] == move.expert
            assert move.src_slot // source.slots_per_rank == move.src_rank
            assert move.dst_slot // source.slots_per_rank == move.dst_rank


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=60)
def test_bounds_hold_in_every_round(
    seed: int, expert_bytes: int, max_bytes: int, max_internode_bytes: int
) -> None:
    generator = np.random.default_rng(seed)
    source, target = (
        Placement(np.array([random_slots(generator, 4, 3, 9)] * 3, dtype=np.int32), 9, 4)
        for _ in range(2)
    )
    least = 1 + expert_bytes // 50
    pace = Pace(
        max_bytes=max(max_bytes, least), max_internode_bytes=max(max_internode_bytes, least)
    )
    migration = schedule(
        source,
        target,
        target.even_quotas_LP(),
        topology=Topology(node_of_rank=(0, 0, 1, 1)),
        expert_bytes_L=[expert_bytes] * 3,
        pace=pace,
        staging_slots=5,
    )
    moves = moves_of(migration)
    assert max((move.staging for move in moves), default=0) < 5
    for batch in migration.batches:
        for transfers in transfers_by_round(batch):
            bytes_2RL = np.zeros((2, 4, len(LINKS)), dtype=np.int64)
            for number, start, stop in transfers:
                move = moves[number]
                for way, rank in enumerate((move.src_rank, move.dst_rank)):
                    bytes_2RL[way, rank, LINKS.index(move.link)] += stop - start
            assert bytes_2RL.sum(axis=2).max() <= pace.max_bytes
            assert bytes_2RL[:, :, LINKS.index("internode")].max() <= pace.max_internode_bytes


@pytest.mark.parametrize(("staging_slots", "most_idle"), [(4, 1.25), (8, 1.10)])
def test_the_busiest_rank_is_hardly_ever_idle(staging_slots: int, most_idle: float) -> None:
    """Two experts of a layer arrive at a rank at most, as in plans; layers are whole one after the other."""
    generator = np.random.default_rng(7)
    source = Placement.contiguous(num_layers=24, num_experts=64, num_ranks=8)
    slots_LP = source.slots_LP.copy()
    for slots_P in slots_LP:
        for _ in range(6):
            one, other = generator.choice(64, 2, replace=False)
            slots_P[[one, other]] = slots_P[[other, one]]
    migration = schedule(
        source,
        Placement(slots_LP, 64, 8),
        source.even_quotas_LP(),
        topology=Topology.single_node(8),
        expert_bytes_L=[100_000] * 24,
        pace=Pace.of_bytes(16_384),
        staging_slots=max(staging_slots, 6),
    )
    sent_R, received_R = np.zeros((2, 8))
    for move in moves_of(migration):
        if move.link != "local":
            sent_R[move.src_rank] += 100_000
        received_R[move.dst_rank] += 100_000
    bound = max(sent_R.max(), received_R.max()) / 16_384
    assert bound <= migration.num_rounds <= most_idle * bound
    assert len(migration.batches) > 12


def tiny(slots_P: list[int], target_P: list[int], **settings: object) -> Migration:
    experts = max(slots_P) + 1
    ranks = settings.pop("ranks", 3)
    assert isinstance(ranks, int)
    source = Placement(np.array([slots_P], dtype=np.int32), experts, ranks)
    target = Placement(np.array([target_P], dtype=np.int32), experts, ranks)
    arguments = {
        "topology": Topology(node_of_rank=(0, 0, 1)[:ranks]),
        "expert_bytes_L": [1000],
        "pace": Pace.of_bytes(1000),
        "staging_slots": 2,
    }
    return schedule(source, target, target.even_quotas_LP(), **(arguments | settings))  # type: ignore[arg-type]


def test_the_nearest_replica_serves() -> None:
    migration = tiny([0, 1, 2, 3, 0, 2], [0, 1, 0, 3, 0, 2])
    (batch,) = migration.batches
    (move,) = batch.moves
    assert (move.src_slot, move.link) == (0, "intranode")
    assert migration.num_bytes("intranode") == migration.num_bytes() == 1000
    assert migration.num_bytes("internode") == 0
    assert (batch.num_moves("intranode"), batch.num_moves("internode")) == (1, 0)
    assert (batch.arrivals(1), batch.arrivals(0)) == ((move,), ())


def test_a_copy_within_a_rank_is_local() -> None:
    migration = tiny([0, 1, 2, 3], [1, 0, 2, 3], ranks=2)
    assert [move.link for move in migration.batches[0].moves] == ["local", "local"]


def test_equal_sources_share_the_work() -> None:
    nodes = Topology.single_node(4)
    source = [0, 1, 0, 2, 3, 4, 3, 4]
    target = [0, 1, 0, 2, 0, 4, 0, 3]
    migration = tiny(source, target, ranks=4, topology=nodes)
    senders = [move.src_rank for move in migration.batches[0].moves if move.expert == 0]
    assert sorted(senders) == [0, 1]


def test_an_expert_larger_than_the_bound_is_cut() -> None:
    migration = tiny([0, 1, 2, 3], [0, 2, 1, 3], ranks=2, pace=Pace.of_bytes(512))
    rounds = transfers_by_round(migration.batches[0])
    cuts = [[(start, stop) for _, start, stop in transfers] for transfers in rounds]
    assert cuts == [[(0, 512), (0, 512)], [(512, 1000), (512, 1000)]]
    assert migration.num_rounds == 2


def swaps_in_layers(*layers: int) -> tuple[Placement, Placement]:
    """Two ranks swap an expert in each of these layers of four."""
    source = Placement.contiguous(num_layers=4, num_experts=4, num_ranks=2)
    slots_LP = source.slots_LP.copy()
    slots_LP[list(layers)] = [0, 2, 1, 3]
    return source, Placement(slots_LP, 4, 2)


def swapped(*, max_bytes: int, staging_slots: int, first: tuple[int, ...] = ()) -> Migration:
    """Layers 0, 2 and 3, with experts of 1024 bytes."""
    source, target = swaps_in_layers(0, 2, 3)
    return schedule(
        source,
        target,
        target.even_quotas_LP(),
        topology=Topology.single_node(2),
        expert_bytes_L=[1024] * 4,
        pace=Pace(max_bytes=max_bytes, max_internode_bytes=max_bytes, layers=first),
        staging_slots=staging_slots,
    )


def test_layers_that_are_whole_after_the_same_round_are_committed_together() -> None:
    migration = swapped(max_bytes=4096, staging_slots=2)
    assert [batch.layers for batch in migration.batches] == [(0, 2), (3,)]
    assert [move.staging for move in moves_of(migration)] == [0, 0, 1, 1, 0, 0]


def test_the_next_layer_begins_before_the_one_before_it_is_whole() -> None:
    migration = swapped(max_bytes=768, staging_slots=2)
    assert [batch.layers for batch in migration.batches] == [(0,), (2,), (3,)]
    transfers = transfers_by_round(migration.batches[0])
    assert transfers == [
        [(0, 0, 768), (1, 0, 768)],
        [(0, 768, 1024), (1, 768, 1024), (2, 0, 512), (3, 0, 512)],
    ]


def test_a_layer_waits_for_room_in_the_staging_memory() -> None:
    assert swapped(max_bytes=768, staging_slots=1).num_rounds == 6
    assert swapped(max_bytes=768, staging_slots=2).num_rounds == 4


def test_layers_are_committed_in_the_order_of_the_pace() -> None:
    migration = swapped(max_bytes=1024, staging_slots=2, first=(3, 1, 2))
    assert [batch.layers for batch in migration.batches] == [(3,), (2,), (0,)]


def test_nothing_to_move_is_no_batch() -> None:
    migration = tiny([0, 1], [0, 1], ranks=2)
    assert migration.batches == ()
    assert (migration.num_moves, migration.num_rounds, migration.num_bytes()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"staging_slots": 1}, "layer 0 changes 2 slots on rank 0, but the staging memory holds 1"),
        ({"topology": Topology.single_node(3)}, "3 ranks"),
        ({"expert_bytes_L": [1, 1]}, "2 layers have an expert size"),
        ({"pace": Pace.of_bytes(0)}, "0 bytes a round"),
        (
            {"pace": Pace(max_bytes=1, max_internode_bytes=0)},
            "0 of them between nodes",
        ),
        ({"expert_bytes_L": [0]}, "0 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny([0, 1, 2, 3], [2, 3, 0, 1], ranks=2, **settings)


def test_placements_of_other_sizes_are_refused() -> None:
    one = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
    two = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
    with pytest.raises(ValueError, match="cannot migrate"):
        schedule(
            one,
            two,
            two.even_quotas_LP(),
            topology=Topology.single_node(2),
            expert_bytes_L=[1],
            pace=Pace.of_bytes(1),
            staging_slots=4,
        )


def signatures() -> dict[str, int]:
    """How many types of arguments each function of a schedule is compiled for."""
    return {
        name: len(function.dispatcher.signatures)
        for module in COMPILED
        for name, function in vars(importlib.import_module(module)).items()
        if isinstance(function, Compiled)
    }


def test_nothing_is_left_to_compile_after_start() -> None:
    compile_schedule()
    known = signatures()
    tiny([0, 1, 2, 3], [1, 0, 2, 3], ranks=2, rank=1)
    generator = np.random.default_rng(0)
    source, target = (
        Placement(np.array([random_slots(generator, 8, 9, 64) for _ in range(3)]), 64, 8)
        for _ in range(2)
    )
    schedule(
        source,
        target,
        target.even_quotas_LP(),
        topology=Topology(node_of_rank=(0, 0, 0, 0, 1, 1, 1, 1)),
        expert_bytes_L=(70_000, 90_016, 50_000),
        pace=Pace.of_bytes(2000),
        staging_slots=18,
        rank=5,
    )
    assert min(known[name] for name in ("fill_rounds", "_nearest", "_legs", "_places")) > 0
    assert signatures() == known
