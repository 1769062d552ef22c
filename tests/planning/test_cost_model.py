from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from shapes import STEPS, problems, small_roofline, window_of

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, TokenCost, cost_model, mean_imbalance_L
from ep_rebalance.planning.problem import Problem

ROOFLINE = small_roofline()
"""Reading an expert takes as long as computing 10 tokens."""


def per_step(*tokens_E: float) -> WindowLoad:
    """One sample of one layer with so many tokens in each of its steps."""
    return window_of(STEPS * np.array([[tokens_E]], dtype=np.float64))


def placed(*slots_P: int) -> Placement:
    return Placement(np.array([slots_P], dtype=np.int32), max(slots_P) + 1, 2)


def test_tokens_cost_themselves() -> None:
    load = per_step(3, 0)
    assert (TokenCost().expert_cost_WLE(load) == load.tokens_WLE).all()
    assert TokenCost().even_cost_WL(load, 2).tolist() == [[STEPS * 1.5]]
    assert TokenCost().split(load, placed(0, 1, 0, 1)).tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_few_tokens_cost_the_reading() -> None:
    cost_E = ROOFLINE.expert_cost_WLE(per_step(11, 3, 0.5, 0))[0, 0] / STEPS
    assert cost_E == pytest.approx([11, 10 * (1 - np.exp(-3)), 10 * (1 - np.exp(-0.5)), 0])


def test_where_ranks_compute_longer_than_they_read_tokens_cost_themselves() -> None:
    assert ROOFLINE.expert_cost_WLE(per_step(30, 5))[0, 0] == pytest.approx([30 * STEPS, 5 * STEPS])


def test_a_rank_waits_for_the_slower_of_all_its_reading_and_all_its_arithmetic() -> None:
    load = per_step(40, 0, 12)
    cost_WLR = ROOFLINE.rank_cost_WLR(load, placed(0, 1, 0, 2), np.array([[0.05, 1, 0.95, 1]]))
    assert cost_WLR[0, 0] / STEPS == pytest.approx([10 * (1 - np.exp(-2)), 38 + 12])


def test_samples_count_by_their_steps() -> None:
    tokens_WLE = np.array([[[20.0, 4.0]], [[200.0, 40.0]]])
    load = WindowLoad(tokens_WLE=tokens_WLE, weight_W=np.ones(2), steps_W=np.array([1.0, 10.0]))
    cost_WLE = ROOFLINE.expert_cost_WLE(load)
    assert cost_WLE[1] == pytest.approx(10 * cost_WLE[0])
    two_ranks = Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2)
    rank_cost_WLR = ROOFLINE.rank_cost_WLR(load, two_ranks, np.ones((1, 2)))
    assert rank_cost_WLR[1] == pytest.approx(10 * rank_cost_WLR[0])


def test_a_replica_that_is_read_in_vain_counts_as_imbalance() -> None:
    """Four experts on two ranks: two reads each would do, but with both replicas it is three each."""
    load, placement = per_step(5, 5, 5, 5), placed(0, 1, 2, 0, 3, 2)
    read = 1 - np.exp(-np.array([2.5, 5]))
    both = mean_imbalance_L(ROOFLINE, load, placement, np.array([[0.5, 1, 0.5, 0.5, 1, 0.5]]))
    assert both == pytest.approx([(2 * read[0] + read[1]) / (2 * read[1])])
    one = mean_imbalance_L(ROOFLINE, load, placement, np.array([[1, 1, 0, 0, 1, 1]]))
    assert one == pytest.approx([1.0])


def test_the_split_has_one_active_replica_where_steps_mostly_read() -> None:
    placement = placed(0, 1, 2, 0, 3, 2)
    few = ROOFLINE.split(per_step(4, 4, 4, 4), placement)
    assert sorted(few[0]) == [0, 0, 1, 1, 1, 1]
    many = ROOFLINE.split(per_step(400, 400, 400, 400), placement)
    assert many.tolist() == TokenCost().split(per_step(400, 400, 400, 400), placement).tolist()


@given(problems())
@settings(max_examples=100, derandomize=True)
def test_no_rank_is_costlier_than_its_experts_and_the_costliest_no_cheaper_than_even_ones(
    problem: Problem,
) -> None:
    current, load = problem.current, problem.load
    quotas_LP = current.even_quotas_LP()
    cost_WLR = problem.cost.rank_cost_WLR(load, current, quotas_LP)
    assert cost_WLR.shape == (len(load.weight_W), current.num_layers, current.num_ranks)
    even_WL = problem.cost.even_cost_WL(load, current.num_ranks)
    assert (cost_WLR.max(axis=2) >= even_WL * (1 - 1e-9)).all()
    # Some ranks may read while others compute: each replica reads once at most, each token counts once.
    alone_WL = current.num_ranks * even_WL
    assert (cost_WLR.sum(axis=2) <= (current.max_replicas + 1) * alone_WL + 1e-9).all()


def test_the_configuration_chooses_what_is_balanced() -> None:
    assert cost_model(load_config()) == TokenCost()
    hardware = {
        "memory_bytes_per_second": 2e12,
        "flops_per_second": 1e15,
        "bytes_per_parameter": 0.5,
    }
    config = load_config({"planner": {"objective": "time"}, "hardware": hardware})
    # In a second 4e12 parameters are read, or as many computed for 125 tokens.
    assert cost_model(config) == RooflineCost(reading=125.0)
