from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import SEEDS, clusters

from ep_rebalance.kernels.route_and_count import LayerTables, route_torch
from ep_rebalance.placement import Placement
from ep_rebalance.routing.thresholds import HASH_RANGE, dispatch_thresholds
from ep_rebalance.topology import Topology

ROUNDING = 1.5 / HASH_RANGE


def random_quotas_LP(placement: Placement, seed: int, drop_some: bool) -> NDArray[np.float64]:
    """Any, of which some may be 0."""
    quotas_LP = np.random.default_rng(seed).random(placement.slots_LP.shape)
    for slots_P, quotas_P in zip(placement.slots_LP, quotas_LP, strict=True):
        if drop_some:
            _, first_slots = np.unique(slots_P, return_index=True)
            quotas_P[np.setdiff1d(np.arange(len(slots_P))[::2], first_slots)] = 0.0
        quotas_P /= np.bincount(slots_P, weights=quotas_P)[slots_P]
    return quotas_LP


def sent_RLP(
    placement: Placement, quotas_LP: NDArray[np.float64], topology: Topology
) -> NDArray[np.float64]:
    """Part of its tokens for the slot's expert that each source rank sends to the slot."""
    layers = range(placement.num_layers)
    sent = np.zeros((placement.num_ranks, *quotas_LP.shape))
    for rank in range(placement.num_ranks):
        slots, thresholds = dispatch_thresholds(
            placement, layers, quotas_LP, topology=topology, rank=rank
        )
        assert slots.dtype == thresholds.dtype == np.int32
        assert slots.shape == (*placement.replica_counts_LE().shape, placement.max_replicas)
        share = np.diff(thresholds, axis=2, prepend=0) / HASH_RANGE
        assert share.min() >= 0
        assert share[slots < 0].sum() == 0
        assert (thresholds[..., -1] == HASH_RANGE).all()
        used = slots >= 0
        sent[rank, np.nonzero(used)[0], slots[used]] = share[used]
    return sent


@st.composite
def source_clusters(draw: st.DrawFn) -> tuple[Placement, Topology]:
    """Tokens of single ranks, of tensor-parallel groups, of all ranks; groups may span nodes."""
    placement, topology = draw(clusters())
    sizes = [n for n in range(1, topology.num_ranks + 1) if topology.num_ranks % n == 0]
    return placement, replace(topology, ranks_per_source=draw(st.sampled_from(sizes)))


@given(source_clusters(), SEEDS, st.booleans())
@settings(max_examples=150)
def test_sources_together_meet_the_quotas(
    cluster: tuple[Placement, Topology], seed: int, drop_some: bool
) -> None:
    placement, topology = cluster
    quotas_LP = random_quotas_LP(placement, seed, drop_some)
    received_LP = sent_RLP(placement, quotas_LP, topology).mean(axis=0)
    assert received_LP == pytest.approx(quotas_LP, abs=ROUNDING)


@given(source_clusters(), SEEDS, st.booleans())
@settings(max_examples=150)
def test_the_own_source_comes_first_then_the_nodes_nearby(
    cluster: tuple[Placement, Topology], seed: int, drop_some: bool
) -> None:
    """What stays in a source, or nearby, is all that it brings or all that the quota lets in."""
    placement, topology = cluster
    quotas_LP = random_quotas_LP(placement, seed, drop_some)
    sent = sent_RLP(placement, quotas_LP, topology)
    groups = [np.array(topology.source_of_rank), nearby_R(topology)]
    rank_P = np.arange(placement.num_slots) // placement.slots_per_rank
    for group_R in groups:
        for group in np.unique(group_R):
            brought = np.mean(group_R == group)
            here = group_R[rank_P] == group
            stays_LP = sent[group_R == group].sum(axis=0) / placement.num_ranks
            for layer in range(placement.num_layers):
                experts_N = placement.slots_LP[layer, here]
                stays_E = np.bincount(experts_N, weights=stays_LP[layer, here])
                room_E = np.bincount(experts_N, weights=quotas_LP[layer, here])
                tolerance = ROUNDING * placement.num_ranks
                assert stays_E == pytest.approx(np.minimum(brought, room_E), abs=tolerance)


def nearby_R(topology: Topology) -> NDArray[np.int64]:
    """Ranks that a chain of common nodes and common sources joins have the same number."""
    node_R, source_R = np.array(topology.node_of_rank), np.array(topology.source_of_rank)
    joined_RR = (node_R[:, None] == node_R) | (source_R[:, None] == source_R)
    for _ in range(topology.num_ranks):
        joined_RR = joined_RR @ joined_RR
    return np.argmax(joined_RR, axis=1)


@given(source_clusters(), SEEDS)
@settings(max_examples=100)
def test_every_pair_is_computed_once_over_ranks_that_share_tokens(
    cluster: tuple[Placement, Topology], seed: int
) -> None:
    """A rank computes the slots that it holds, for the tokens of all sources; those of each source come
    from the rank in it that has the same place, as gathered over data-parallel groups. The outputs of
    all ranks are added."""
    placement, topology = cluster
    quotas_LP = random_quotas_LP(placement, seed, drop_some=False)
    size, slots_per_rank = topology.ranks_per_source, placement.slots_per_rank
    for source in range(topology.num_ranks // size):
        ids_TK = np.random.default_rng(seed + source).integers(placement.num_experts, size=(40, 2))
        slots_RTK = [
            slots_TK(placement, quotas_LP, topology, rank, ids_TK)
            for rank in range(source * size, (source + 1) * size)
        ]
        computed_TK = sum(
            slots_RTK[rank % size] // slots_per_rank == rank for rank in range(topology.num_ranks)
        )
        assert (computed_TK == 1).all()
        assert (placement.slots_LP[0][slots_RTK[0]] == ids_TK).all()


def slots_TK(
    placement: Placement,
    quotas_LP: NDArray[np.float64],
    topology: Topology,
    rank: int,
    ids_TK: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Where a rank sends its tokens."""
    slots, thresholds = dispatch_thresholds(placement, [0], quotas_LP, topology=topology, rank=rank)
    tables = LayerTables(
        counts_AE=torch.zeros(3, placement.num_experts, dtype=torch.int64),
        replica_slots_EC=torch.from_numpy(slots[0]),
        thresholds_EC=torch.from_numpy(thresholds[0]),
    )
    chosen: NDArray[np.int64] = route_torch(
        torch.from_numpy(ids_TK), tables, torch.tensor([7])
    ).numpy()
    return chosen


def test_ranks_of_a_source_split_by_the_quotas_among_themselves() -> None:
    """Expert 0 is on all ranks; each of two groups keeps its tokens, and splits them three to one."""
    placement = Placement(np.array([[0, 1, 0, 2, 0, 3, 0, 4]], dtype=np.int32), 5, 4)
    quotas_LP = np.array([[0.375, 1, 0.125, 1, 0.125, 1, 0.375, 1]])
    pairs = Topology(node_of_rank=(0, 0, 0, 0), ranks_per_source=2)
    sent = sent_RLP(placement, quotas_LP, pairs)[:, 0, ::2]
    assert sent.tolist() == [[0.75, 0.25, 0, 0]] * 2 + [[0, 0, 0.25, 0.75]] * 2


def test_nodes_that_a_source_spans_are_one() -> None:
    """Expert 0 is on ranks 0 and 4. The second of the four sources is near the first one, which is on
    its node, too; the last is near none."""
    placement = Placement(np.array([[0, 1, 2, 3, 0, 4, 5, 6]], dtype=np.int32), 7, 8)
    quotas_LP = np.array([[0.5, 1, 1, 1, 0.5, 1, 1, 1]])
    spanning = Topology(node_of_rank=(0, 1, 1, 1, 2, 2, 3, 3), ranks_per_source=2)
    sent = sent_RLP(placement, quotas_LP, spanning)[::2, 0]
    assert sent[:, [0, 4]].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_a_token_stays_on_its_rank_if_it_may() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
    quotas_LP = np.array([[0.5, 1, 0.5, 1]])
    sent = sent_RLP(placement, quotas_LP, Topology.single_node(2))
    assert sent[:, 0].tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]


def test_a_token_stays_on_its_node_if_it_may() -> None:
    """Expert 0 is on ranks 1 and 3; ranks 0 and 2 send to the one on their node."""
    placement = Placement(np.array([[1, 0, 2, 0]], dtype=np.int32), 3, 4)
    quotas_LP = np.array([[1, 0.5, 1, 0.5]])
    near = sent_RLP(placement, quotas_LP, Topology(node_of_rank=(0, 0, 1, 1)))
    assert near[:, 0, [1, 3]].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    far = sent_RLP(placement, quotas_LP, Topology.single_node(4))
    assert far[:, 0, [1, 3]].tolist() == [[0.5, 0.5], [1, 0], [0.5, 0.5], [0, 1]]


def test_only_the_layers_asked_for_are_worked_out() -> None:
    slots_LP = np.array([[0, 1, 0, 2], [0, 2, 1, 2]], dtype=np.int32)
    placement = Placement(slots_LP, 3, 2)
    quotas_LP = np.array([[0.25, 1, 0.75, 1], [1, 0.75, 1, 0.25]])
    one_node = Topology.single_node(2)
    whole = dispatch_thresholds(placement, [0, 1], quotas_LP, topology=one_node, rank=0)
    second = dispatch_thresholds(placement, [1], quotas_LP, topology=one_node, rank=0)
    for both, alone in zip(whole, second, strict=True):
        assert (both[1:] == alone).all()


@pytest.mark.parametrize(("experts", "ranks"), [(5, 2), (9, 4), (8, 2)])
def test_an_expert_without_a_second_slot_goes_to_its_own(experts: int, ranks: int) -> None:
    """Also where ranks have unequally many."""
    placement = Placement.round_robin(num_layers=2, num_experts=experts, num_ranks=ranks)
    slots_LEC, thresholds_LEC = dispatch_thresholds(
        placement,
        [0, 1],
        placement.even_quotas_LP(),
        topology=Topology.single_node(ranks),
        rank=0,
    )
    assert (thresholds_LEC == HASH_RANGE).all()
    for slots_P, slots_E in zip(placement.slots_LP, slots_LEC[:, :, 0], strict=True):
        assert slots_P[slots_E].tolist() == list(range(experts))
