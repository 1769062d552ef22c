from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import Samples, budget_of, placements, random_samples

from ep_rebalance.placement import Placement
from ep_rebalance.planning.descent import improve_layer
from ep_rebalance.planning.incremental import _apply, plan_incremental
from ep_rebalance.planning.plan import Budget
from ep_rebalance.planning.policies import PLANNERS, compile_planner, make_plan
from ep_rebalance.planning.second_moment import second_moment_EE
from ep_rebalance.topology import Topology

SEEDS = st.integers(0, 2**32 - 1)


def incremental(samples_WLE: Samples, current: Placement, budget: Budget) -> Placement:
    topology = Topology.single_node(current.num_ranks)
    return plan_incremental(samples_WLE, current, topology, budget, 0)


def objective(moment_EE: NDArray[np.float64], slots_P: NDArray[np.int32], ranks: int) -> float:
    replicas_E = np.bincount(slots_P, minlength=len(moment_EE))
    total = 0.0
    for experts_S in slots_P.reshape(ranks, -1):
        part_S = 1.0 / replicas_E[experts_S]
        total += float(part_S @ moment_EE[np.ix_(experts_S, experts_S)] @ part_S)
    return total


@given(placements(), SEEDS, st.integers(0, 12), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_plan_is_a_placement_within_the_budget(
    current: Placement, seed: int, max_moved: int, max_arrivals: int
) -> None:
    budget = Budget(max_moved_slots=max_moved, max_arrivals=max_arrivals)
    target = incremental(random_samples(seed, current, skew=1.5), current, budget)
    changed_LP = target.slots_LP != current.slots_LP
    assert changed_LP.sum() <= max_moved
    by_rank = changed_LP.reshape(current.num_layers, current.num_ranks, -1).sum(axis=2)
    assert by_rank.max() <= max_arrivals


@given(placements(max_layers=1), SEEDS)
@settings(max_examples=100, deadline=None)
def test_gains_are_what_the_objective_loses(current: Placement, seed: int) -> None:
    samples_WLE = random_samples(seed, current, skew=1.5)
    moment_EE = second_moment_EE(samples_WLE[:, 0], current.num_ranks)
    slots_P = current.slots_LP[0].copy()
    descent = improve_layer(moment_EE, slots_P, current.num_ranks, 1000, 1000, 1e-6)
    before = objective(moment_EE, slots_P, current.num_ranks)
    for change_4, gain in zip(*descent, strict=True):
        _apply(slots_P, change_4[None])
        after = objective(moment_EE, slots_P, current.num_ranks)
        assert gain > 0
        assert after == pytest.approx(before - gain)
        before = after


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("skew", [0.5, 0.8])
def test_a_tiny_model_gets_even_in_one_plan(redundant: int, skew: float) -> None:
    current = tiny(redundant)
    samples_WLE = random_samples(1, current, skew=skew)
    plan = make_plan(
        "incremental", samples_WLE, current, Topology.single_node(2), budget_of(current), 0
    )
    assert (1 / plan.imbalance_after_L).mean() >= 0.97


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_tiny_model_gets_even_in_a_few_plans_of_a_tenth(redundant: int) -> None:
    current = tiny(redundant)
    samples_WLE = random_samples(2, current, skew=0.8)
    for _ in range(6):
        budget = budget_of(current, fraction=0.1, arrivals=2)
        plan = make_plan("incremental", samples_WLE, current, Topology.single_node(2), budget, 0)
        assert plan.moved_slots <= 0.1 * current.slots_LP.size
        current = plan.placement
    assert (1 / plan.imbalance_after_L).mean() >= 0.97
    assert plan.moved_slots == 0


def tiny(redundant: int) -> Placement:
    return Placement.contiguous(num_layers=4, num_experts=16, num_ranks=2, num_redundant=redundant)


@pytest.mark.parametrize("seed", range(3))
def test_noise_moves_next_to_nothing(seed: int) -> None:
    current = Placement.contiguous(num_layers=8, num_experts=64, num_ranks=8)
    samples_WLE = random_samples(seed, current, skew=0.0)
    target = incremental(samples_WLE, current, budget_of(current))
    assert target.changed_slots(current) <= 0.01 * current.slots_LP.size


def test_experts_that_are_busy_together_part_ways() -> None:
    """All experts have the same mean load, so only their covariance says what to do."""
    current = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
    samples_WLE = np.tile([[[9000.0, 9000, 1000, 1000]], [[1000, 1000, 9000, 9000]]], (8, 1, 1))
    target = incremental(samples_WLE, current, budget_of(current))
    load = [target.rank_load_LR(load_LE).tolist() for load_LE in samples_WLE]
    assert load == [[[10000, 10000]]] * 16


def test_an_idle_layer_stays_and_the_worst_layer_is_served_first() -> None:
    current = Placement.contiguous(num_layers=3, num_experts=4, num_ranks=2)
    load_LE = np.array([[0, 0, 0, 0], [60, 50, 40, 50], [90, 90, 10, 10]]) * 1e4
    target = incremental(
        np.tile(load_LE, (4, 1, 1)), current, Budget(max_moved_slots=2, max_arrivals=2)
    )
    changed_L = (target.slots_LP != current.slots_LP).sum(axis=1)
    assert changed_L.tolist() == [0, 0, 2]


def test_nothing_is_left_to_compile_after_start() -> None:
    compile_planner()
    known = len(improve_layer.signatures)  # type: ignore[attr-defined]
    current = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2, num_redundant=2)
    for policy in PLANNERS:
        make_plan(
            policy,
            random_samples(0, current),
            current,
            Topology.single_node(2),
            budget_of(current),
            0,
        )
    assert len(improve_layer.signatures) == known  # type: ignore[attr-defined]
