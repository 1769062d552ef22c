"""The ground under ranks: what one source keeps near, the others may send to each other."""

from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.scoring import score_own_counts
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.pours import ground_of_ranks
from ep_rebalance.routing.thresholds import dispatch_thresholds
from ep_rebalance.topology import Topology

TOPOLOGIES = [
    Topology.single_node(8),
    Topology(node_of_rank=(0, 0, 0, 0, 1, 1, 1, 1)),
    Topology(node_of_rank=(0, 0, 0, 0, 1, 1, 1, 1), ranks_per_source=2),
]


def planned(topology, seed=0, layers=2, experts=64, redundant=32):
    """(placement, quotas, load) for a load that some experts have most of."""
    load_LE = 1e4 * np.random.default_rng(seed).lognormal(size=(layers, experts))
    start = Placement.contiguous(
        num_layers=layers,
        num_experts=experts,
        num_ranks=topology.num_ranks,
        num_redundant=redundant,
    )
    window = WindowLoad(tokens_WLE=load_LE[None], weight_W=np.ones(1), steps_W=np.ones(1))
    placement = place_anew(window, start, topology)
    return placement, split_quotas(placement, load_LE), load_LE


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=["one node", "two nodes", "pairs"])
def test_over_all_sources_the_ground_is_level(topology):
    placement, quotas_LP, load_LE = planned(topology)
    grounds = []
    for rank in range(0, topology.num_ranks, topology.ranks_per_source):
        tables = dispatch_thresholds(placement, [0, 1], quotas_LP, topology=topology, rank=rank)
        ground_LR = ground_of_ranks(*tables, quotas_LP, load_LE, topology.num_ranks)
        assert (ground_LR >= 0).all()
        own = slice(rank, rank + topology.ranks_per_source)
        assert ground_LR[:, own].mean() < ground_LR.mean()
        grounds.append(ground_LR - ground_LR.mean(axis=1, keepdims=True))
    assert np.abs(np.mean(grounds, axis=0)).max() < 65536 * 1e-3


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=["one node", "two nodes", "pairs"])
def test_tokens_stay_near_and_ranks_level(topology):
    placement, quotas_LP, load_LE = planned(topology, layers=1)
    steps_NLE = np.random.default_rng(1).poisson(load_LE / load_LE.sum() * 16_384, (4, 1, 64))
    level = score_own_counts(steps_NLE, placement, quotas_LP, topology)
    near = score_own_counts(steps_NLE, placement, quotas_LP, topology, load_LE=load_LE)
    assert near.on_source > 1.2 * level.on_source
    assert near.on_node >= level.on_node
    assert near.balancedness > level.balancedness - 0.01


def test_a_layer_without_load_stands_on_level_ground():
    topology = Topology.single_node(8)
    placement, quotas_LP, load_LE = planned(topology)
    tables = dispatch_thresholds(placement, [0, 1], quotas_LP, topology=topology, rank=3)
    ground_LR = ground_of_ranks(*tables, quotas_LP, load_LE * [[1], [0]], 8)
    assert ground_LR[0].any()
    assert not ground_LR[1].any()
