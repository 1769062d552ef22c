from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import SEEDS, clusters

from ep_rebalance.placement import Placement
from ep_rebalance.planning.dispatch import HASH_RANGE, dispatch_thresholds
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


@given(clusters(), SEEDS, st.booleans())
@settings(max_examples=100)
def test_source_ranks_together_meet_the_quotas(
    cluster: tuple[Placement, Topology], seed: int, drop_some: bool
) -> None:
    placement, topology = cluster
    quotas_LP = random_quotas_LP(placement, seed, drop_some)
    received_LP = sent_RLP(placement, quotas_LP, topology).mean(axis=0)
    assert received_LP == pytest.approx(quotas_LP, abs=ROUNDING)


@given(clusters(), SEEDS, st.booleans())
@settings(max_examples=100)
def test_the_own_rank_comes_first_then_the_own_node(
    cluster: tuple[Placement, Topology], seed: int, drop_some: bool
) -> None:
    """What stays on a rank, or on a node, is all that it brings or all that the quota lets in."""
    placement, topology = cluster
    quotas_LP = random_quotas_LP(placement, seed, drop_some)
    sent = sent_RLP(placement, quotas_LP, topology)
    rank_P = np.arange(placement.num_slots) // placement.slots_per_rank
    node_R = np.array(topology.node_of_rank)
    for rank in range(placement.num_ranks):
        here = rank_P == rank
        kept_LP = np.minimum(1.0, quotas_LP[:, here] * placement.num_ranks)
        assert sent[rank][:, here] == pytest.approx(kept_LP, abs=ROUNDING)
    for node in range(topology.num_nodes):
        brought = np.mean(node_R == node)
        here = node_R[rank_P] == node
        stays_LP = sent[node_R == node].sum(axis=0) / placement.num_ranks
        for layer in range(placement.num_layers):
            experts_N = placement.slots_LP[layer, here]
            stays_E = np.bincount(experts_N, weights=stays_LP[layer, here])
            room_E = np.bincount(experts_N, weights=quotas_LP[layer, here])
            tolerance = ROUNDING * placement.num_ranks
            assert stays_E == pytest.approx(np.minimum(brought, room_E), abs=tolerance)


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
