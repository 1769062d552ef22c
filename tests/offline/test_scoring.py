from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from shapes import SEEDS, clusters, random_samples

from ep_rebalance.offline.scoring import (
    Moves,
    balancedness,
    best_split_balancedness,
    cross_node_tokens,
    even_balancedness,
    moves_between,
)
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.thresholds import dispatch_thresholds
from ep_rebalance.topology import Topology

REPLICATED = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
TWO_NODES = Topology(node_of_rank=(0, 1))


def test_balancedness_is_the_mean_over_steps_and_layers() -> None:
    placement = Placement.contiguous(num_layers=2, num_experts=2, num_ranks=2)
    steps_NLE = np.array([[[1, 1], [3, 1]], [[0, 5], [0, 0]]])
    assert balancedness(steps_NLE, placement) == pytest.approx((1 + 2 / 3 + 1 / 2 + 1) / 4)


def test_balancedness_follows_the_quotas() -> None:
    steps_NLE = np.array([[[4, 3, 1]]])
    assert balancedness(steps_NLE, REPLICATED) == pytest.approx(4 / 5)
    assert balancedness(steps_NLE, REPLICATED, np.array([[0.25, 1, 0.75, 1]])) == 1.0


def test_chance_alone_is_the_worse_the_fewer_pairs_a_rank_gets() -> None:
    assert even_balancedness(32, 1) == 1.0
    assert even_balancedness(2, 2) == pytest.approx((1 + 1 / 2) / 2, abs=0.02)
    assert even_balancedness(1 << 15, 32) == pytest.approx(0.939, abs=0.002)


def test_the_best_split_is_made_for_each_step() -> None:
    steps_NLE = np.array([[[4, 3, 1]], [[4, 1, 3]], [[0, 3, 1]]])
    assert best_split_balancedness(steps_NLE, REPLICATED) == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_tokens_cross_where_their_node_lacks_the_expert_or_its_quota() -> None:
    steps_NLE = np.array([[[4, 3, 1]]])

    def crossing(first_quota: float, topology: Topology = TWO_NODES) -> float:
        quotas_LP = np.array([[first_quota, 1, 1 - first_quota, 1]])
        return cross_node_tokens(steps_NLE, REPLICATED, quotas_LP, topology)

    assert crossing(0.5) == pytest.approx((3 + 1) / 2 / 8)
    assert crossing(0.75) == pytest.approx(((3 + 1) / 2 + 4 * 0.25) / 8)
    assert crossing(0.5, Topology.single_node(2)) == pytest.approx(0.0)


@given(clusters(), SEEDS)
@settings(max_examples=60)
def test_as_many_tokens_cross_as_the_dispatch_sends(
    cluster: tuple[Placement, Topology], seed: int
) -> None:
    placement, topology = cluster
    steps_NLE = random_samples(seed, placement).astype(np.int64)
    load_LE = steps_NLE.sum(axis=0)
    quotas_LP = split_quotas(placement, load_LE)
    crossing = 0.0
    for rank in range(placement.num_ranks):
        slots, thresholds = dispatch_thresholds(
            placement, range(placement.num_layers), quotas_LP, topology=topology, rank=rank
        )
        share = np.diff(thresholds, axis=2, prepend=0) / 65536
        node = np.array(topology.node_of_rank)[slots // placement.slots_per_rank]
        away = (slots >= 0) & (node != topology.node_of_rank[rank])
        crossing += float(np.sum(load_LE[:, :, None] * share * away)) / placement.num_ranks
    expected = crossing / load_LE.sum()
    assert cross_node_tokens(steps_NLE, placement, quotas_LP, topology) == pytest.approx(
        expected, abs=1e-3
    )


def test_moves_count_bytes_over_links_and_transfers_in_a_row() -> None:
    """Layer 0: ranks 0 and 1 exchange both experts. Layer 1: ranks 0 and 2, on other nodes,
    exchange one. Layer 2 stays."""
    source = Placement.contiguous(num_layers=3, num_experts=6, num_ranks=3)
    slots_LP = [[2, 3, 0, 1, 4, 5], [0, 5, 2, 3, 4, 1], [0, 1, 2, 3, 4, 5]]
    target = Placement(np.array(slots_LP, dtype=np.int32), 6, 3)
    topology = Topology(node_of_rank=(0, 0, 1))
    assert moves_between(source, target, topology, (10, 100, 1000)) == Moves(
        slots=6,
        fraction=6 / 18,
        bytes=4 * 10 + 2 * 100,
        busiest_rank_bytes=2 * 10 + 100,
        serial_transfers=(2 + 1) / 2,
        cross_node=2 / 6,
    )


def test_an_expert_that_changes_its_slot_on_a_rank_needs_no_link() -> None:
    source = Placement(np.array([[0, 1, 2, 3]], dtype=np.int32), 4, 2)
    target = Placement(np.array([[1, 0, 2, 3]], dtype=np.int32), 4, 2)
    moves = moves_between(source, target, TWO_NODES, (10,))
    assert (moves.slots, moves.bytes, moves.serial_transfers, moves.cross_node) == (2, 0, 0.0, 0.0)


def test_nothing_moves_between_a_placement_and_itself() -> None:
    moves = moves_between(REPLICATED, REPLICATED, TWO_NODES, (10,))
    assert (moves.slots, moves.fraction, moves.bytes, moves.busiest_rank_bytes) == (0, 0.0, 0, 0)
