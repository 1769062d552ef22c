from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from shapes import budget_of, problem_of, problems, random_samples, small_roofline

from ep_rebalance import planning
from ep_rebalance.compiled import Compiled
from ep_rebalance.placement import Placement
from ep_rebalance.planning.incremental.descent import improve_layer
from ep_rebalance.planning.incremental.layer import LayerInputs, describe_experts
from ep_rebalance.planning.incremental.planner import (
    _apply,
    even_parts_EC,
    plan_incremental,
)
from ep_rebalance.planning.policies import compile_planner, make_plan, own_planners
from ep_rebalance.planning.problem import Budget, Plan, Problem
from ep_rebalance.topology import Topology

TOKENS = 1e6
"""So many that the noise of counting them is out of sight."""


def on_four_ranks(*experts_of_ranks: tuple[int, int]) -> Placement:
    slots_P = np.array(experts_of_ranks, dtype=np.int32).reshape(-1)
    return Placement(slots_P[None], int(slots_P.max()) + 1, 4)


def tiny(redundant: int) -> Placement:
    return Placement.contiguous(num_layers=4, num_experts=16, num_ranks=2, num_redundant=redundant)


def describe_first_layer(problem: Problem) -> LayerInputs:
    current = problem.current
    return describe_experts(
        np.ascontiguousarray(problem.cost.expert_cost_WLE(problem.load)[:, 0]),
        problem.load.weight_W,
        even_parts_EC(current),
        np.array(current.slots_LP[0]),
        np.array(problem.topology.node_of_rank),
        4.0,
        problem.internode_token_price,
    )


def objective(problem: Problem, experts: LayerInputs, slots_P: NDArray[np.int32]) -> float:
    """Sum of squared rank loads, and what it costs that experts are missing on nodes."""
    topology, mean_E = problem.topology, experts.vectors_EV[:, 0]
    replicas_E = np.bincount(slots_P, minlength=len(mean_E))
    part_E = experts.part_EC[np.arange(len(mean_E)), replicas_E]
    total = float(replicas_E @ (part_E**2 * experts.own_E))
    nodes_of_expert: list[set[int]] = [set() for _ in mean_E]
    for rank, experts_S in enumerate(slots_P.reshape(topology.num_ranks, -1)):
        total += float(np.sum((part_E[experts_S] @ experts.vectors_EV[experts_S]) ** 2))
        for expert in experts_S:
            nodes_of_expert[expert].add(topology.node_of_rank[rank])
    at_hand_E = np.array([len(nodes) for nodes in nodes_of_expert]) / topology.num_nodes
    return total - 2.0 * problem.internode_token_price * float(at_hand_E @ mean_E)


@given(problems())
@settings(max_examples=200)
def test_every_plan_is_a_placement_within_the_budget(problem: Problem) -> None:
    current, budget = problem.current, problem.budget
    changed_LP = plan_incremental(problem).slots_LP != current.slots_LP
    assert changed_LP.sum() <= budget.max_moved_slots
    by_rank = changed_LP.reshape(current.num_layers, current.num_ranks, -1).sum(axis=2)
    assert by_rank.max() <= budget.max_arrivals


@given(problems())
@settings(max_examples=200)
def test_gains_are_what_the_objective_loses(problem: Problem) -> None:
    experts, slots_P = describe_first_layer(problem), np.array(problem.current.slots_LP[0])
    descent = improve_layer(experts, slots_P, 1000, 1000, 1e-6)
    before = objective(problem, experts, slots_P)
    for change_4, (gain, _) in zip(*descent, strict=True):
        _apply(slots_P, change_4[None])
        after = objective(problem, experts, slots_P)
        assert gain > 0
        assert after == pytest.approx(before - gain, rel=1e-9, abs=1e-9)
        before = after


@given(problems(max_layers=5))
@settings(max_examples=30)
def test_threads_and_repetition_do_not_change_the_plan(problem: Problem) -> None:
    others = {
        "topology": problem.topology,
        "budget": problem.budget,
        "cost": problem.cost,
        "internode_token_price": problem.internode_token_price,
    }
    plans = [
        plan_incremental(problem_of(problem.load, problem.current, threads=threads, **others))
        for threads in (1, 1, 2, 4)
    ]
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("skew", [0.5, 0.8])
def test_a_tiny_model_gets_even_in_one_plan(redundant: int, skew: float) -> None:
    current = tiny(redundant)
    plan = plan_of(problem_of(random_samples(1, current, skew=skew), current))
    assert (1 / plan.imbalance_after_L).mean() >= 0.97


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_tiny_model_gets_even_in_a_few_plans_of_a_tenth(redundant: int) -> None:
    current = tiny(redundant)
    samples_WLE = random_samples(2, current, skew=0.8)
    budget = budget_of(current, fraction=0.1, arrivals=2)
    for _ in range(6):
        plan = plan_of(problem_of(samples_WLE, current, budget=budget))
        assert plan.moved_slots <= 0.1 * current.slots_LP.size
        current = plan.placement
    assert (1 / plan.imbalance_after_L).mean() >= 0.97
    assert plan.moved_slots == 0


def plan_of(problem: Problem) -> Plan:
    return make_plan(plan_incremental, problem)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("redundant", [0, 8])
def test_noise_moves_next_to_nothing(seed: int, redundant: int) -> None:
    """Where replicas make the loads uneven, the redundant slots may be spread."""
    current = Placement.contiguous(
        num_layers=8, num_experts=64, num_ranks=8, num_redundant=redundant
    )
    samples_WLE = random_samples(seed, current, skew=0.0)
    settled = plan_incremental(problem_of(np.full_like(samples_WLE, TOKENS), current))
    target = plan_incremental(problem_of(samples_WLE, settled))
    assert target.changed_slots(settled) <= 0.01 * current.slots_LP.size


def test_experts_that_are_busy_together_part_ways() -> None:
    """All experts have the same mean load, so only their covariance says what to do."""
    current = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
    samples_WLE = np.tile([[[9000.0, 9000, 1000, 1000]], [[1000, 1000, 9000, 9000]]], (8, 1, 1))
    target = plan_incremental(problem_of(samples_WLE, current))
    load = [target.rank_load_LR(load_LE).tolist() for load_LE in samples_WLE]
    assert load == [[[10000, 10000]]] * 16


def test_an_idle_layer_stays_and_the_worst_layer_is_served_first() -> None:
    current = Placement.contiguous(num_layers=3, num_experts=4, num_ranks=2)
    load_LE = np.array([[0, 0, 0, 0], [60, 50, 40, 50], [90, 90, 10, 10]]) * 1e4
    budget = Budget(max_moved_slots=2, max_arrivals=2)
    target = plan_incremental(problem_of(np.tile(load_LE, (4, 1, 1)), current, budget=budget))
    changed_L = (target.slots_LP != current.slots_LP).sum(axis=1)
    assert changed_L.tolist() == [0, 0, 2]


@pytest.mark.parametrize(("node_of_rank", "partner"), [((0, 0, 0, 0), 1), ((0, 1, 0, 1), 2)])
def test_an_equally_good_move_within_the_node_is_preferred(
    node_of_rank: tuple[int, ...], partner: int
) -> None:
    current = on_four_ranks((0, 1), (2, 3), (4, 5), (6, 7))
    load_E = TOKENS * np.array([12.0, 12, 8, 8, 8, 8, 8, 8])
    topology = Topology(node_of_rank=node_of_rank)
    target = plan_incremental(problem_of(np.tile(load_E, (4, 1, 1)), current, topology=topology))
    changed_LR = (target.slots_LP != current.slots_LP).reshape(1, 4, 2).any(axis=2)
    assert np.flatnonzero(changed_LR[0]).tolist() == [0, partner]


def test_ranks_on_nodes_of_their_own_are_evened_out_however_slow_their_links_are() -> None:
    current = on_four_ranks((0, 1), (2, 3), (4, 5), (6, 7))
    load_E = TOKENS * np.array([12.0, 12, 8, 8, 8, 8, 8, 8])
    slow = Topology(node_of_rank=(0, 1, 2, 3), bytes_per_second=(200e9, 20e9, 5e7))
    target, near = (
        plan_incremental(problem_of(np.tile(load_E, (4, 1, 1)), current, topology=topology))
        for topology in (slow, Topology.single_node(4))
    )
    assert target == near != current


@pytest.mark.parametrize(("price", "ranks"), [(0.0, [0, 1]), (0.5, [0, 2])])
def test_replicas_spread_over_nodes_where_tokens_pay_for_the_way(
    price: float, ranks: list[int]
) -> None:
    """One more replica of expert 0 may take the place of expert 1 on rank 1 or 2 alike; both links
    are as fast."""
    current = on_four_ranks((0, 2), (1, 3), (1, 4), (5, 6))
    load_E = TOKENS * np.array([30.0, 4, 2, 8, 8, 8, 2])
    target = plan_incremental(
        problem_of(
            np.tile(load_E, (4, 1, 1)),
            current,
            topology=Topology(node_of_rank=(0, 0, 1, 1), bytes_per_second=(1, 1, 1)),
            budget=Budget(max_moved_slots=1, max_arrivals=1),
            internode_token_price=price,
        )
    )
    assert (np.flatnonzero(target.slots_LP[0] == 0) // 2).tolist() == ranks


def signatures() -> dict[str, int]:
    found = {}
    for info in pkgutil.walk_packages(planning.__path__, f"{planning.__name__}."):
        for name, function in vars(importlib.import_module(info.name)).items():
            if isinstance(function, Compiled):
                found[f"{info.name}.{name}"] = len(function.dispatcher.signatures)
    return found


def test_nothing_is_left_to_compile_after_start() -> None:
    compile_planner()
    known = signatures()
    for ranks, experts in ((2, 8), (24, 46)):
        current = Placement.contiguous(
            num_layers=2, num_experts=experts, num_ranks=ranks, num_redundant=2
        )
        samples_WLE = random_samples(0, current)
        for planner in own_planners().values():
            make_plan(planner, problem_of(samples_WLE, current))
            make_plan(planner, problem_of(samples_WLE, current, cost=small_roofline(), threads=2))
    assert known["ep_rebalance.planning.incremental.descent.improve_layer"]
    assert known["ep_rebalance.planning.incremental.pairs.improve_pairs"]
    assert signatures() == known
