from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.config import DecisionConfig, MigrationConfig
from ep_rebalance.placement import Placement
from ep_rebalance.planning.decision import Decision, decide
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.pace import Pace, Transport
from ep_rebalance.planning.problem import Plan
from ep_rebalance.topology import Topology

CURRENT = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
SWAPPED = Placement(np.array([[0, 2, 1, 3], [0, 1, 2, 3]], dtype=np.int32), 4, 2)
HALF = ExpertTime(fraction=0.5)
TOPOLOGY = Topology(node_of_rank=(0, 0), bytes_per_second=(1000.0, 100.0, 10.0), round_seconds=0.0)


def transport(topology: Topology, *expert_bytes_L: int, max_bytes: int = 4096) -> Transport:
    return Transport(
        settings=MigrationConfig(max_bytes_per_step=max_bytes),
        topology=topology,
        expert_bytes_L=expert_bytes_L,
        step_seconds=0.1,
    )


def judge(
    after: float,
    *,
    target: Placement = SWAPPED,
    step_seconds: float = 0.1,
    trust: float = 1.0,
    expert_time: ExpertTime = HALF,
    **settings: float,
) -> Decision:
    plan = Plan(
        placement=target,
        quotas_LP=target.even_quotas_LP(),
        unmoved_quotas_LP=CURRENT.even_quotas_LP(),
        imbalance_before_L=np.array([2.0, 2.0]),
        imbalance_after_L=np.array([after, 2.0]),
        moved_slots=target.changed_slots(CURRENT),
    )
    config = DecisionConfig.model_validate({"horizon_steps": 100, "min_gain": 0.01} | settings)
    return decide(
        plan,
        step_seconds=step_seconds,
        expert_time=expert_time,
        current=CURRENT,
        transport=transport(TOPOLOGY, 50, 50),
        config=config,
        trust=trust,
    )


def test_a_plan_that_pays_is_accepted_with_its_numbers() -> None:
    decision = judge(1.0)
    assert decision.outcome == "accepted"
    assert decision.accepted
    assert decision.predicted_gain == pytest.approx(0.5 * (1 - 3 / 4))
    assert decision.predicted_saved_seconds == pytest.approx(0.125 * 0.1 * 99)
    assert decision.migration_seconds == pytest.approx(0.5)
    assert "2 slots" in decision.reason
    assert "12.50%" in decision.reason


def test_too_small_a_gain_is_none() -> None:
    assert judge(1.99).outcome == "no_gain"
    assert judge(2.5).outcome == "no_gain"
    assert judge(2.5).predicted_gain < 0


def test_nothing_moved_is_no_gain_whatever_is_promised() -> None:
    decision = judge(1.0, target=CURRENT, min_gain=0.0)
    assert (decision.outcome, decision.migration_seconds) == ("no_gain", 0.0)


def test_a_gain_that_does_not_repay_the_transfers_is_over_budget() -> None:
    assert judge(1.0, min_gain_over_cost=2.4).outcome == "accepted"
    assert judge(1.0, min_gain_over_cost=2.6).outcome == "over_budget"
    assert judge(1.0, step_seconds=0.01).outcome == "over_budget"


def test_a_promise_counts_for_the_part_of_it_that_is_trusted() -> None:
    believed, doubted = judge(1.0), judge(1.0, trust=0.2)
    assert doubted.predicted_gain == pytest.approx(0.2 * believed.predicted_gain)
    assert doubted.predicted_saved_seconds == pytest.approx(0.2 * believed.predicted_saved_seconds)
    assert doubted.migration_seconds == believed.migration_seconds
    assert (believed.outcome, doubted.outcome) == ("accepted", "over_budget")
    assert judge(1.0, trust=0.05).outcome == "no_gain"


def test_a_layer_saves_nothing_until_it_is_committed() -> None:
    """Both layers save as much for each byte, and are committed after 5 and 10 of 10 steps."""
    target = Placement(np.array([[0, 2, 1, 3]] * 2, dtype=np.int32), 4, 2)
    plan = Plan(
        placement=target,
        quotas_LP=target.even_quotas_LP(),
        unmoved_quotas_LP=CURRENT.even_quotas_LP(),
        imbalance_before_L=np.array([2.0, 2.0]),
        imbalance_after_L=np.array([1.0, 1.0]),
        moved_slots=4,
    )
    seconds = [
        decide(
            plan,
            step_seconds=0.1,
            expert_time=ExpertTime(fraction=1.0),
            current=CURRENT,
            transport=transport(TOPOLOGY, 20480, 20480),
            config=DecisionConfig(horizon_steps=horizon),
        ).predicted_saved_seconds
        for horizon in (100, 8)
    ]
    assert seconds == pytest.approx([0.5 * 0.1 * (95 + 90) / 2, 0.5 * 0.1 * 3 / 2])


def test_a_gain_that_may_be_nothing_is_none() -> None:
    sure = ExpertTime(fraction=0.1, standard_error=0.01, source="learned")
    unsure = ExpertTime(fraction=0.1, standard_error=0.09, source="learned")
    settings = {"min_gain_over_cost": 0.0}
    accepted = judge(1.0, expert_time=sure, **settings)
    assert (accepted.outcome, accepted.predicted_gain) == ("accepted", pytest.approx(0.025))
    refused = judge(1.0, expert_time=unsure, **settings)
    assert (refused.outcome, refused.predicted_gain) == ("no_gain", pytest.approx(0.025))
    assert "2.50% (0.25% at least)" in refused.reason
    assert judge(1.0, expert_time=unsure, min_gain=0.002, **settings).accepted


def test_what_is_expected_is_held_against_the_cost() -> None:
    unsure = ExpertTime(fraction=0.5, standard_error=0.25, source="assumed")
    assert judge(1.0, expert_time=unsure, min_gain_over_cost=2.4).outcome == "accepted"
    assert judge(1.0, expert_time=unsure, min_gain_over_cost=2.6).outcome == "over_budget"


def test_a_gain_that_is_no_number_is_none() -> None:
    assert judge(np.nan).outcome == "no_gain"
    assert judge(1.0, trust=np.nan).outcome == "no_gain"
    assert judge(1.0, step_seconds=np.nan).outcome == "over_budget"


def test_cost_is_the_time_of_the_busiest_rank_over_its_links() -> None:
    current = Placement(np.array([[0, 1, 2, 3, 0, 2]], dtype=np.int32), 4, 3)
    nodes = Topology(
        node_of_rank=(0, 0, 1), bytes_per_second=(1000.0, 100.0, 10.0), round_seconds=0.25
    )
    pace = Pace(max_bytes=20, max_internode_bytes=10)
    moved = Placement(np.array([[0, 1, 2, 3, 1, 2]], dtype=np.int32), 4, 3)
    assert transport(nodes, 50).cost(moved, current, pace) == (5, pytest.approx(5.0 + 5 * 0.25))
    nearer = Placement(np.array([[0, 2, 1, 3, 0, 2]], dtype=np.int32), 4, 3)
    assert transport(nodes, 50).cost(nearer, current, pace) == (3, pytest.approx(0.5 + 3 * 0.25))
