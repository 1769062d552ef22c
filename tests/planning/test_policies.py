from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import budget_of, placements, random_samples

from ep_rebalance.config import Policy
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import PLANNERS, make_plan, mean_imbalance_L
from ep_rebalance.topology import Topology


def test_every_policy_has_a_planner() -> None:
    assert set(PLANNERS) == set(get_args(Policy))


@given(placements(), st.integers(0, 2**32 - 1), st.sampled_from(get_args(Policy)))
@settings(max_examples=60, deadline=None)
def test_plans_are_whole_repeatable_and_leave_their_input_alone(
    current: Placement, seed: int, policy: Policy
) -> None:
    samples_WLE = random_samples(seed, current)
    given_WLE = samples_WLE.copy()
    topology = Topology.single_node(current.num_ranks)
    plans = [
        make_plan(policy, samples_WLE, current, topology, budget_of(current, 0.5), 0)
        for _ in range(2)
    ]
    assert plans[0].placement == plans[1].placement
    assert (plans[0].quotas_LP == plans[1].quotas_LP).all()
    assert (samples_WLE == given_WLE).all()
    assert plans[0].moved_slots == plans[0].placement.changed_slots(current)
    assert min(plans[0].imbalance_before_L.min(), plans[0].imbalance_after_L.min()) >= 1 - 1e-9
    if policy == "none":
        assert plans[0].placement == current
        assert (plans[0].imbalance_before_L == plans[0].imbalance_after_L).all()


def test_imbalance_is_the_mean_over_snapshots() -> None:
    placement = Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2)
    samples_WLE = np.array([[[1.0, 1.0]], [[3.0, 1.0]], [[0.0, 0.0]]])
    imbalance = mean_imbalance_L(samples_WLE, placement, placement.even_quotas_LP())
    assert imbalance == pytest.approx([(1 + 1.5 + 1) / 3])
