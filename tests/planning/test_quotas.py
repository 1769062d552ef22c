from __future__ import annotations

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from shapes import SEEDS, clusters, random_samples

from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology


def expert_sums_E(placement: Placement, quotas_P: NDArray[np.float64]) -> NDArray[np.float64]:
    sums_E = np.zeros(placement.num_experts)
    np.add.at(sums_E, placement.slots_LP[0], quotas_P)
    return sums_E


def lowest_busiest(placement: Placement, load_E: NDArray[np.float64]) -> float:
    """The optimum of the linear programme over one layer: least load of the busiest rank."""
    solver = highspy.Highs()
    solver.silent()
    busiest = solver.addVariable(lb=0, obj=1)
    tokens_P = [solver.addVariable(lb=0) for _ in range(placement.num_slots)]
    slots_P = placement.slots_LP[0]
    for expert in range(placement.num_experts):
        replicas = [tokens_P[slot] for slot in np.flatnonzero(slots_P == expert)]
        solver.addConstr(sum(replicas) == float(load_E[expert]))
    for rank in range(placement.num_ranks):
        first = rank * placement.slots_per_rank
        solver.addConstr(sum(tokens_P[first : first + placement.slots_per_rank]) <= busiest)
    solver.minimize()
    return float(solver.getInfo().objective_function_value)


def test_a_single_slot_takes_all_and_no_load_is_even() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
    assert split_quotas(placement, np.array([[0, 5, 1]])).tolist() == [[0.5, 1, 0.5, 1]]
    assert split_quotas(placement, np.zeros((1, 3))).tolist() == [[0.5, 1, 0.5, 1]]


def test_the_busy_rank_is_spared() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
    assert split_quotas(placement, np.array([[4, 3, 1]])).tolist() == [[0.25, 1, 0.75, 1]]
    assert split_quotas(placement, np.array([[4, 9, 1]])).tolist() == [[0, 1, 1, 1]]


@given(clusters(max_layers=1), SEEDS)
@settings(max_examples=60)
def test_quotas_are_the_optimum_of_the_linear_programme(
    cluster: tuple[Placement, Topology], seed: int
) -> None:
    placement, _ = cluster
    load_LE = random_samples(seed, placement, skew=2.0).sum(axis=0)
    quotas_LP = split_quotas(placement, load_LE)
    assert quotas_LP.min() >= 0
    assert expert_sums_E(placement, quotas_LP[0]) == pytest.approx(1.0)
    load_LR = placement.rank_load_LR(load_LE, quotas_LP)
    assert load_LR.max() <= lowest_busiest(placement, load_LE[0]) + 1e-3 * load_LR.mean()


def test_layers_are_split_one_by_one() -> None:
    placement = Placement(np.array([[0, 1, 0, 2], [0, 2, 1, 2]], dtype=np.int32), 3, 2)
    load_LE = np.array([[4, 3, 1], [3, 1, 4]])
    assert split_quotas(placement, load_LE).tolist() == [[0.25, 1, 0.75, 1], [1, 0.25, 1, 0.75]]
