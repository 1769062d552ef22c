from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import problem_of, problems, window_of

from ep_rebalance.config import PlannerConfig
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import mean_imbalance_L
from ep_rebalance.planning.policies import make_plan, own_planners, planner_of, staging_slots
from ep_rebalance.planning.problem import Problem
from ep_rebalance.policies import POLICIES

TWO_RANKS = Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2)


def test_every_policy_but_the_engines_own_has_a_planner() -> None:
    assert set(own_planners()) == set(POLICIES) - {"vllm"}
    assert all(callable(planner) for planner in own_planners().values())


@given(problems(), st.sampled_from(sorted(own_planners())))
@settings(max_examples=100)
def test_plans_are_whole_repeatable_and_leave_their_input_alone(
    problem: Problem, policy: str
) -> None:
    load, current = problem.load, problem.current
    inputs = (load.tokens_WLE, load.weight_W, load.steps_W)
    given = [array.copy() for array in inputs]
    plans = [make_plan(planner_of(policy), problem) for _ in range(2)]
    assert plans[0].placement == plans[1].placement
    assert (plans[0].quotas_LP == plans[1].quotas_LP).all()
    assert all((now == before).all() for now, before in zip(inputs, given, strict=True))
    assert plans[0].moved_slots == plans[0].placement.changed_slots(current)
    assert min(plans[0].imbalance_before_L.min(), plans[0].imbalance_after_L.min()) >= 1 - 1e-9
    if policy == "none":
        assert plans[0].placement == current
        assert plans[0].promised == 0.0


def test_a_plan_promises_what_the_busiest_ranks_save() -> None:
    current = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
    load_LE = np.array([[6e6, 6e6, 2e6, 2e6], [1e6, 1e6, 1e6, 1e6]])
    plan = make_plan(planner_of("incremental"), problem_of(load_LE[None], current))
    assert plan.imbalance_before_L == pytest.approx([1.5, 1.0])
    assert plan.imbalance_after_L == pytest.approx([1.0, 1.0])
    assert plan.promised == pytest.approx(1 - 2 / 2.5)


def test_imbalance_is_the_mean_over_samples() -> None:
    problem = problem_of(np.array([[[1.0, 1.0]], [[3.0, 1.0]], [[0.0, 0.0]]]), TWO_RANKS)
    imbalance_L = mean_imbalance_L(
        problem.cost, problem.load, TWO_RANKS, TWO_RANKS.even_quotas_LP()
    )
    assert imbalance_L == pytest.approx([(1 + 1.5 + 1) / 3])


def test_older_samples_count_less() -> None:
    load: WindowLoad = window_of(np.array([[[3.0, 1.0]], [[1.0, 1.0]]]), half_life=1.0)
    problem = problem_of(load, TWO_RANKS)
    imbalance_L = mean_imbalance_L(
        problem.cost, problem.load, TWO_RANKS, TWO_RANKS.even_quotas_LP()
    )
    assert imbalance_L == pytest.approx([(0.5 * 1.5 + 1) / 1.5])


@pytest.mark.parametrize(
    ("policy", "max_staging_bytes", "slots"),
    [
        ("incremental", 9_999, 9),
        ("incremental", 100, 2),  # the arrivals of a layer in any case
        ("incremental", 1 << 40, 40),  # and no more than a migration can use
        ("greedy", 9_999, 30),
        ("greedy", 45_000, 45),
    ],
)
def test_staging_memory_holds_what_is_allowed_and_at_least_a_layer(
    policy: str, max_staging_bytes: int, slots: int
) -> None:
    settings = PlannerConfig(policy=policy)
    assert staging_slots(settings, max_staging_bytes, 30, [500] * 10 + [1000] * 10) == slots


@pytest.mark.parametrize(("policy", "slots"), [("greedy", 2), ("greedy", 3), ("incremental", 3)])
def test_no_plan_gives_an_expert_more_replicas_than_tables_have_columns(policy, slots):
    """One expert has nearly all tokens, and would be on all ranks."""
    current = Placement.contiguous(
        num_layers=1, num_experts=96, num_ranks=96, num_redundant=96 * (slots - 1)
    )
    load_E = np.ones(96)
    load_E[5] = 1e4
    target = planner_of(policy)(problem_of(np.tile(load_E, (3, 1, 1)), current))
    assert target.replica_counts_LE()[0, 5] == current.max_replicas == 64
