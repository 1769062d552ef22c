"""Splitting by own counts: what it hands out, how even it is, and that all forms of it give the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.kernels.language import INTERPRETED
from ep_rebalance.kernels.route_and_count import LayerTables, count_torch, route_torch
from ep_rebalance.kernels.route_by_own_counts import (
    PourTables,
    route_by_own_counts,
    route_by_own_counts_torch,
)
from ep_rebalance.kernels.shared_arithmetic import Ranks
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.routing.pours import pour_order
from ep_rebalance.routing.route import _on_host, route
from ep_rebalance.routing.thresholds import dispatch_thresholds
from ep_rebalance.topology import Topology


def random_step(tokens, top_k, experts, redundant, ranks, seed=0, dtype=torch.int32, device="cpu"):
    """What `route_by_own_counts` takes, for a placement and ids drawn at random."""
    rng = np.random.default_rng(seed)
    slots = experts + redundant
    own_RS = rng.permutation(experts).reshape(ranks, -1)
    more_R = [
        rng.permutation(np.setdiff1d(range(experts), own))[: redundant // ranks] for own in own_RS
    ]
    slots_P = np.concatenate(
        [np.append(own, more) for own, more in zip(own_RS, more_R, strict=True)]
    )
    placement = Placement(slots_P[None].astype(np.int32), experts, ranks)
    load_LE = rng.exponential(size=(1, experts)) ** 3 + 1e-3
    rank = int(rng.integers(ranks))
    table, thresholds = dispatch_thresholds(
        placement,
        [0],
        split_quotas(placement, load_LE),
        topology=Topology.single_node(ranks),
        rank=rank,
    )
    order = pour_order(
        table, rows=max(redundant, 1), slots_per_rank=slots // ranks, num_ranks=ranks
    )
    weights = load_LE[0] / load_LE[0].sum()
    ids = [rng.choice(experts, top_k, replace=False, p=weights) for _ in range(tokens)]
    ids_TK = torch.from_numpy(np.array(ids, dtype=np.int64).reshape(tokens, top_k)).to(dtype)
    ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
    tables = LayerTables(
        counts_AE=torch.zeros(3, experts, dtype=torch.int64, device=device),
        replica_slots_EC=torch.from_numpy(table[0]).to(device),
        thresholds_EC=torch.from_numpy(thresholds[0]).to(device),
    )
    poured_X, colour_X, row_E = (torch.from_numpy(part[0]).to(device) for part in order)
    ground_R = torch.from_numpy(rng.integers(0, 30_000, ranks).astype(np.int32)).to(device)
    pours = PourTables(poured_X=poured_X, colour_X=colour_X, row_E=row_E, ground_R=ground_R)
    phase_T = torch.from_numpy(rng.integers(0, 3, tokens)).to(device, torch.int8)
    offset = torch.tensor([int(rng.integers(1 << 40))], device=device)
    which = Ranks(total=ranks, slots=slots // ranks, source=rank)
    return placement, ids_TK.to(device), phase_T, tables, pours, offset, which


def shapes():
    """(tokens, top_k, experts, redundant, ranks)"""
    return st.tuples(
        st.integers(0, 90),
        st.integers(1, 8),
        st.integers(1, 5),
        st.integers(0, 4),
        st.integers(2, 6),
    ).map(
        lambda s: (
            s[0],
            min(s[1], s[2] * s[4]),
            s[2] * s[4],
            min(s[3], s[2] * (s[4] - 1)) * s[4],
            s[4],
        )
    )


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 999))
def test_every_token_goes_to_a_slot_that_holds_its_expert(shape, seed):
    placement, ids_TK, *rest = random_step(*shape, seed)
    slots_TK = route_by_own_counts_torch(ids_TK, *rest).numpy()
    held = placement.slots_LP[0][slots_TK.clip(0)]
    assert (np.where(slots_TK < 0, -1, held) == ids_TK.numpy()).all()
    counted = torch.zeros_like(rest[1].counts_AE)
    count_torch(ids_TK, rest[0], counted)
    assert torch.equal(rest[1].counts_AE, counted)


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 999))
def test_the_host_gives_the_same_bits(shape, seed):
    _, ids_TK, phase_T, tables, *rest = random_step(*shape, seed)
    expected_TK = route_by_own_counts_torch(ids_TK, phase_T, tables, *rest)
    counted = tables.counts_AE.clone()
    tables.counts_AE.zero_()
    assert torch.equal(_on_host(ids_TK, phase_T, tables, *rest), expected_TK)
    assert torch.equal(tables.counts_AE, counted)


SHAPES = [
    (1, 1, 4, 0, 2),
    (5, 2, 4, 2, 2),
    (17, 3, 9, 3, 3),
    (64, 8, 32, 8, 4),
    (300, 4, 16, 32, 16),
    (300, 2, 18, 306, 18),  # experts with more replicas than are poured
    (520, 4, 64, 32, 8),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_reference_give_the_same_bits(shape, dtype, device):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("there is no kernel to compare")
    _, ids_TK, phase_T, tables, *rest = random_step(*shape, sum(shape), dtype, device)
    expected_TK = route_by_own_counts_torch(ids_TK, phase_T, tables, *rest)
    counted = tables.counts_AE.clone()
    tables.counts_AE.zero_()
    assert torch.equal(route_by_own_counts(ids_TK, phase_T, tables, *rest), expected_TK)
    assert torch.equal(tables.counts_AE, counted)


def test_ranks_that_share_their_tokens_send_them_alike():
    placement = Placement.contiguous(num_layers=1, num_experts=8, num_ranks=4, num_redundant=8)
    topology = Topology(node_of_rank=(0,) * 4, ranks_per_source=2)
    ids_TK = torch.randint(0, 8, (40, 2), dtype=torch.int32)
    sent = []
    for rank in (2, 3):
        counts = RoutingTables(
            placement=placement,
            max_tokens=64,
            device=torch.device("cpu"),
            topology=topology,
            rank=rank,
            by_own_counts=True,
        )
        counts.set_dispatch([0], placement, placement.even_quotas_LP())
        sent.append(counts.route(0, ids_TK, 0))
    assert torch.equal(*sent)
    assert torch.equal(sent[0], counts.route(0, ids_TK, 0))


@pytest.mark.skipif(INTERPRETED, reason="large steps, and every form gives the same bits")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("experts", "ranks", "redundant"),
    [(256, 8, 16), (256, 32, 32), (256, 64, 64), (256, 8, 64), (8, 4, 4), (16, 4, 8), (64, 8, 32)],
)
def test_own_tokens_load_ranks_as_the_best_split_would(experts, ranks, redundant, seed):
    """To within a hundredth of a rank's mean load and a token that is rounded, on a planned placement."""
    rng, topology = np.random.default_rng(seed), Topology.single_node(ranks)
    load_LE = rng.lognormal(size=(1, experts))
    start = Placement.contiguous(
        num_layers=1, num_experts=experts, num_ranks=ranks, num_redundant=redundant
    )
    window = WindowLoad(tokens_WLE=1e4 * load_LE[None], weight_W=np.ones(1), steps_W=np.ones(1))
    placement = place_anew(window, start, topology)
    counts = RoutingTables(
        placement=placement,
        max_tokens=0,
        device=torch.device("cpu"),
        topology=topology,
        rank=0,
        by_own_counts=True,
    )
    counts.set_dispatch([0], placement, split_quotas(placement, load_LE))
    ids_TK = torch.from_numpy(rng.choice(experts, (2048, 8), p=load_LE[0] / load_LE.sum()))
    ranks_TK = counts.route(0, ids_TK, 0) // placement.slots_per_rank
    own_LE = np.bincount(ids_TK.flatten(), minlength=experts)[None]
    best_R = placement.rank_load_LR(own_LE, split_quotas(placement, own_LE))[0]
    load_R = torch.bincount(ranks_TK.flatten())
    assert load_R.max() <= best_R.max() + 0.01 * best_R.mean() + 1


@pytest.mark.skipif(INTERPRETED, reason="hundreds of steps, and every form gives the same bits")
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_rounding_favours_no_replica(tokens):
    """Over many steps of short batches, with two ranks that are alike, each replica gets its half."""
    placement = Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2, num_redundant=2)
    counts = RoutingTables(
        placement=placement,
        max_tokens=64,
        device=torch.device("cpu"),
        topology=Topology.single_node(2),
        rank=0,
        by_own_counts=True,
    )
    counts.set_dispatch([0], placement, placement.even_quotas_LP())
    received_P = torch.zeros(4)
    ids_TK = torch.zeros(tokens, 1, dtype=torch.int32)
    for _ in range(600):
        counts.mark_tokens(np.zeros(tokens, dtype=np.int8))
        received_P += torch.bincount(counts.route(0, ids_TK, 0).flatten(), minlength=4)
        counts.end_step()
    halves = received_P[torch.from_numpy(placement.replica_slots(0)[0].astype(np.int64))]
    assert (halves / halves.sum()).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_step_of_very_few_tokens_goes_by_quotas(device):
    """Of eight ranks, one with three pairs; with four it pours."""
    for pairs, goes_by_quotas in ((3, True), (4, False)):
        differs = False
        for seed in range(30):
            _, _, phase_T, tables, *rest = random_step(1, 1, 16, 16, 8, seed, device=device)
            ids_TK = torch.full((pairs, 1), seed % 16, dtype=torch.int32, device=device)
            by_quotas_TK = route_torch(ids_TK, tables, rest[1])
            sent_TK = route(ids_TK, phase_T, tables, *rest)
            differs |= not torch.equal(sent_TK, by_quotas_TK)
        assert differs != goes_by_quotas, pairs


def test_layers_without_rows_go_by_quotas():
    _, ids_TK, phase_T, tables, pours, offset, ranks = random_step(40, 2, 8, 8, 4, 3)
    nothing = torch.empty(0, dtype=torch.int32)
    unpoured = PourTables(
        poured_X=nothing,
        colour_X=nothing,
        row_E=torch.full_like(pours.row_E, -1),
        ground_R=pours.ground_R,
    )
    sent_TK = route(ids_TK, phase_T, tables, unpoured, offset, ranks)
    assert torch.equal(sent_TK, route_torch(ids_TK, tables, offset))


def test_the_operation_for_a_compiled_graph_gives_the_same(device):
    if device == "cpu" and INTERPRETED:
        pytest.skip("kernels are not interpreted in a graph")
    _, ids_TK, phase_T, tables, pours, offset, ranks = random_step(17, 2, 8, 8, 4, 3, device=device)
    expected_TK = route(ids_TK, phase_T, tables, pours, offset, ranks)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids_TK, phase_T, tables, pours, offset, ranks), expected_TK)


def test_fake_and_real_forms_agree(device):
    _, ids_TK, phase_T, tables, pours, offset, ranks = random_step(17, 2, 8, 8, 4, 3, device=device)
    parts = (tables.counts_AE, tables.replica_slots_EC, tables.thresholds_EC)
    rows = (pours.poured_X, pours.colour_X, pours.row_E, pours.ground_R)
    torch.library.opcheck(
        torch.ops.ep_rebalance.route.default,
        (ids_TK, phase_T, *parts, *rows, offset, ranks.total, ranks.slots, ranks.source),
        test_utils=("test_schema", "test_faketensor"),
    )
