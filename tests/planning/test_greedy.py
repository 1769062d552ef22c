from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from shapes import problem_of, problems

from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.greedy import plan_greedy
from ep_rebalance.planning.problem import Problem


@given(problems())
@settings(max_examples=100)
def test_every_plan_is_a_placement_and_settles(problem: Problem) -> None:
    target = plan_greedy(problem)
    assert target.slots_LP.shape == problem.current.slots_LP.shape
    assert target.changed_slots(plan_greedy(problem_of(problem.load, target))) == 0


def test_copies_go_to_the_hottest_and_ranks_end_even() -> None:
    current = Placement.contiguous(num_layers=1, num_experts=6, num_ranks=2, num_redundant=2)
    load_E = np.array([2.0, 2.0, 8.0, 4.0, 8.0, 2.0])
    target = plan_greedy(problem_of(np.tile(load_E, (3, 1, 1)), current))
    assert target.replica_counts_LE().tolist() == [[1, 1, 2, 1, 2, 1]]
    assert imbalance_L(target.rank_load_LR(load_E[None]))[0] < 1.16


def test_a_layer_without_load_stays() -> None:
    current = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2)
    samples_WLE = np.zeros((3, 2, 8))
    samples_WLE[:, 1] = [8, 8, 8, 8, 1, 1, 1, 1]
    target = plan_greedy(problem_of(samples_WLE, current))
    assert (target.slots_LP[0] == current.slots_LP[0]).all()
    assert (target.slots_LP[1] != current.slots_LP[1]).any()
