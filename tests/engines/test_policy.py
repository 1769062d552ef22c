"""vLLM's own placement policy as a planner."""

import numpy as np
import pytest
from hypothesis import given, settings
from shapes import problem_of, problems, random_samples

from ep_rebalance.config_sources import load_config
from ep_rebalance.placement import Placement
from ep_rebalance.planning.greedy import plan_greedy
from ep_rebalance.planning.policies import make_plan
from ep_rebalance.topology import Topology


@pytest.fixture(scope="module")
def policy(vllm):
    from ep_rebalance.engines.vllm.seams import eplb_policy as policy

    return policy


def test_the_installed_vllm_keeps_the_contract_of_the_policy(policy):
    for contract in policy.CONTRACTS:
        contract.check()


def test_the_engine_gives_the_policy_its_planner(policy):
    from ep_rebalance.engines.vllm.seams.attachment import _planners

    assert _planners(load_config({"planner": {"policy": "vllm"}})) == {"vllm": policy.plan_vllm}
    assert _planners(load_config({})) == {}


def test_every_plan_is_a_placement_and_an_idle_layer_stays(policy):
    @given(problems())
    @settings(max_examples=100)
    def check(problem):
        target = policy.plan_vllm(problem)
        assert target.slots_LP.shape == problem.current.slots_LP.shape
        for layer in np.flatnonzero(~problem.load.load_LE.any(axis=1)):
            assert (target.slots_LP[layer] == problem.current.slots_LP[layer]).all()

    check()


@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("ranks", "redundant"), [(4, 4), (8, 16), (8, 0)])
def test_it_balances_skewed_load_as_well_as_the_published_algorithm(policy, skew, ranks, redundant):
    current = Placement.contiguous(
        num_layers=8, num_experts=64, num_ranks=ranks, num_redundant=redundant
    )
    problem = problem_of(random_samples(0, current, skew=skew), current)
    balance = [
        float(np.mean(1 / make_plan(planner, problem).imbalance_after_L))
        for planner in (policy.plan_vllm, plan_greedy)
    ]
    assert balance[0] == pytest.approx(balance[1], abs=0.02)


def test_groups_of_experts_stay_together_on_a_node(policy):
    current = Placement.contiguous(num_layers=2, num_experts=16, num_ranks=4)
    nodes = Topology(node_of_rank=(0, 0, 1, 1))
    problem = problem_of(random_samples(0, current), current, topology=nodes)
    target = policy.hierarchical_planner(4)(problem)
    assert_two_groups_on_each_node(target)


@pytest.mark.parametrize("redundant", [4, 8, 16])
def test_replicas_stay_on_the_node_of_their_group(policy, redundant):
    current = Placement.contiguous(
        num_layers=2, num_experts=16, num_ranks=4, num_redundant=redundant
    )
    nodes = Topology(node_of_rank=(0, 0, 1, 1))
    problem = problem_of(random_samples(0, current, skew=2.0), current, topology=nodes)
    assert_two_groups_on_each_node(policy.hierarchical_planner(4)(problem))


def assert_two_groups_on_each_node(target):
    held_by_nodes = target.slots_LP.reshape(2 * target.num_layers, -1)
    groups = [set((slots_P // 4).tolist()) for slots_P in held_by_nodes]
    assert [len(held) for held in groups] == [2] * len(groups)
