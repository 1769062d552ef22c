from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import Samples, budget_of, placements, random_samples

from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.greedy import plan_greedy
from ep_rebalance.topology import Topology


def greedy(samples_WLE: Samples, current: Placement) -> Placement:
    topology = Topology.single_node(current.num_ranks)
    return plan_greedy(samples_WLE, current, topology, budget_of(current), 0)


@given(placements(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=100, deadline=None)
def test_every_plan_is_a_placement_and_settles(current: Placement, seed: int, skew: float) -> None:
    samples_WLE = random_samples(seed, current, skew=skew)
    target = greedy(samples_WLE, current)
    assert target.slots_LP.shape == current.slots_LP.shape
    assert target.changed_slots(greedy(samples_WLE, target)) == 0


def test_copies_go_to_the_hottest_and_ranks_end_even() -> None:
    current = Placement.contiguous(num_layers=1, num_experts=6, num_ranks=2, num_redundant=2)
    load_E = np.array([2.0, 2.0, 8.0, 4.0, 8.0, 2.0])
    target = greedy(np.tile(load_E, (3, 1, 1)), current)
    assert target.replica_counts_LE().tolist() == [[1, 1, 2, 1, 2, 1]]
    assert imbalance_L(target.rank_load_LR(load_E[None]))[0] < 1.16


def test_a_layer_without_load_stays() -> None:
    current = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2)
    samples_WLE = np.zeros((3, 2, 8))
    samples_WLE[:, 1] = [8, 8, 8, 8, 1, 1, 1, 1]
    target = greedy(samples_WLE, current)
    assert (target.slots_LP[0] == current.slots_LP[0]).all()
    assert (target.slots_LP[1] != current.slots_LP[1]).any()
