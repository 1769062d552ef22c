"""Ranks that have unequally many slots: nothing that moves experts takes them."""

from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.migration import schedule
from ep_rebalance.placement import Placement, PlacementError
from ep_rebalance.planning.cost_model import RooflineCost, TokenCost
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.problem import Budget, Problem
from ep_rebalance.planning.quotas import split_by_own_counts, split_quotas
from ep_rebalance.planning.sources import choose_sources
from ep_rebalance.topology import Topology

UNEVEN = Placement.contiguous(num_layers=1, num_experts=5, num_ranks=2)
MOVED = Placement(np.array([[4, 1, 2, 3, 0]]), 5, 2)
LOAD = WindowLoad(
    tokens_WLE=np.array([[[8.0, 1.0, 2.0, 4.0, 0.0]]]), weight_W=np.ones(1), steps_W=np.ones(1)
)
TWO_RANKS = Topology.single_node(2)
BUDGET = Budget(max_moved_slots=5, max_arrivals=3)


def test_no_planner_is_given_them() -> None:
    with pytest.raises(PlacementError, match="no expert can be moved"):
        Problem(load=LOAD, current=UNEVEN, topology=TWO_RANKS, budget=BUDGET)


def test_no_migration_is_scheduled() -> None:
    with pytest.raises(PlacementError, match="no expert can be moved"):
        choose_sources(UNEVEN, MOVED, layers=[0], topology=TWO_RANKS, expert_bytes_L=[10])
    with pytest.raises(PlacementError, match="no expert can be moved"):
        schedule(
            UNEVEN,
            MOVED,
            MOVED.even_quotas_LP(),
            topology=TWO_RANKS,
            expert_bytes_L=[10],
            pace=Pace.of_bytes(100),
            staging_slots=3,
            rank=0,
        )


def test_each_expert_has_all_of_its_tokens_in_its_only_slot() -> None:
    own_LP = split_by_own_counts(UNEVEN, LOAD.load_LE, UNEVEN.even_quotas_LP())
    assert split_quotas(UNEVEN, LOAD.load_LE).tolist() == own_LP.tolist() == [[1.0] * 5]


def test_a_rank_costs_what_its_experts_cost() -> None:
    quotas_LP = UNEVEN.even_quotas_LP()
    assert TokenCost().rank_cost_WLR(LOAD, UNEVEN, quotas_LP).tolist() == [[[11, 4]]]
    # Either rank reads longer than it computes: each of its experts with tokens is read, nearly always.
    roofline = RooflineCost(reading=100.0)
    read_E = 100 * (1 - np.exp(-LOAD.tokens_WLE[0, 0]))
    assert roofline.rank_cost_WLR(LOAD, UNEVEN, quotas_LP)[0, 0] == pytest.approx(
        [read_E[:3].sum(), read_E[3:].sum()]
    )
