from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from shapes import STEPS, problems, small_roofline, window_of

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, TokenCost, cost_model
from ep_rebalance.planning.problem import Problem

ROOFLINE = small_roofline(1)
"""Seconds of a step: 1 to read an expert, 0.1 to compute a token."""


def per_step(*tokens_E: float) -> WindowLoad:
    """One sample of one layer with so many tokens in each of its steps."""
    return window_of(STEPS * np.array([[tokens_E]], dtype=np.float64))


def test_tokens_cost_themselves_and_replicas_share_them() -> None:
    load = per_step(3, 0)
    assert (TokenCost().expert_cost_WLE(load) == load.tokens_WLE).all()
    assert TokenCost().replica_part_EC(load, 0, 2).tolist() == [[0, 1, 1 / 2, 1 / 3]] * 2


def test_many_tokens_cost_their_arithmetic_and_few_the_reading() -> None:
    seconds_E = ROOFLINE.expert_cost_WLE(per_step(1000, 5, 0.5, 0))[0, 0] / STEPS
    assert seconds_E == pytest.approx([100, 1 - np.exp(-5), 1 - np.exp(-0.5), 0])


def test_replicas_halve_arithmetic_but_not_reading() -> None:
    part_EC = ROOFLINE.replica_part_EC(per_step(1000, 5, 0.5, 0), 0, 2)
    assert part_EC.shape == (4, 4)
    assert part_EC[:, :2].tolist() == [[0, 1]] * 4
    assert part_EC[0, 2:] == pytest.approx([1 / 2, 1 / 3])
    assert part_EC[1, 2] == pytest.approx((1 - np.exp(-2.5)) / (1 - np.exp(-5)))
    assert part_EC[2, 2] == pytest.approx((1 - np.exp(-0.25)) / (1 - np.exp(-0.5)))
    assert part_EC[3, 2:] == pytest.approx([1 / 2, 1 / 3])


def test_a_rank_waits_for_the_slower_of_all_its_reading_and_all_its_arithmetic() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
    load = per_step(40, 0, 12)
    cost_WLR = ROOFLINE.rank_cost_WLR(load, placement, np.array([[0.05, 1, 0.95, 1]]))
    assert cost_WLR[0, 0] / STEPS == pytest.approx([1 - np.exp(-2), 3.8 + 1.2])


def test_samples_count_by_their_steps() -> None:
    tokens_WLE = np.array([[[20.0, 4.0]], [[200.0, 40.0]]])
    load = WindowLoad(tokens_WLE=tokens_WLE, weight_W=np.ones(2), steps_W=np.array([1.0, 10.0]))
    cost_WLE = ROOFLINE.expert_cost_WLE(load)
    assert cost_WLE[1] == pytest.approx(10 * cost_WLE[0])
    rank_cost_WLR = ROOFLINE.rank_cost_WLR(
        load, Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2), np.ones((1, 2))
    )
    assert rank_cost_WLR == pytest.approx(cost_WLE)


@given(problems())
@settings(max_examples=100)
def test_more_replicas_cost_more_together_and_less_each(problem: Problem) -> None:
    for layer in range(problem.current.num_layers):
        part_EC = problem.cost.replica_part_EC(problem.load, layer, problem.current.max_replicas)
        assert part_EC.shape[1] == problem.current.max_replicas + 2
        counts_C = np.arange(1, part_EC.shape[1])
        assert (np.diff(part_EC[:, 1:], axis=1) < 1e-12).all()
        assert (np.diff(part_EC[:, 1:] * counts_C, axis=1) > -1e-9).all()


@given(problems())
@settings(max_examples=100)
def test_a_rank_costs_no_more_than_its_experts_one_by_one(problem: Problem) -> None:
    current, load = problem.current, problem.load
    quotas_LP = current.even_quotas_LP()
    cost_WLR = problem.cost.rank_cost_WLR(load, current, quotas_LP)
    expert_cost_WLE = problem.cost.expert_cost_WLE(load)
    assert cost_WLR.shape == (len(load.weight_W), current.num_layers, current.num_ranks)
    assert (cost_WLR <= current.rank_load_LR(expert_cost_WLE, np.ones_like(quotas_LP)) + 1e-9).all()


def test_the_configuration_chooses_what_is_balanced() -> None:
    assert cost_model(load_config(), [100]) == TokenCost()
    hardware = {
        "memory_bytes_per_second": 2e12,
        "flops_per_second": 1e15,
        "bytes_per_parameter": 0.5,
    }
    config = load_config({"planner": {"objective": "time"}, "hardware": hardware})
    assert cost_model(config, [100]) == RooflineCost(
        expert_bytes_L=[100],
        memory_bytes_per_second=2e12,
        flops_per_second=1e15,
        flops_per_byte=4.0,
    )
