from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import placements, random_samples

from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import HASH_RANGE, dispatch_thresholds, split_quotas

SEEDS = st.integers(0, 2**32 - 1)


def expert_sums_E(placement: Placement, quotas_P: NDArray[np.float64]) -> NDArray[np.float64]:
    sums_E = np.zeros(placement.num_experts)
    np.add.at(sums_E, placement.slots_LP[0], quotas_P)
    return sums_E


def lowest_busiest(placement: Placement, load_E: NDArray[np.float64]) -> float:
    """The optimum of the linear programme over one layer: least load of the busiest rank."""
    highspy = pytest.importorskip("highspy")
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


@given(placements(max_layers=1), SEEDS)
@settings(max_examples=60, deadline=None)
def test_quotas_are_the_optimum_of_the_linear_programme(placement: Placement, seed: int) -> None:
    load_LE = random_samples(seed, placement, skew=2.0).sum(axis=0)
    quotas_LP = split_quotas(placement, load_LE)
    assert quotas_LP.min() >= 0
    assert expert_sums_E(placement, quotas_LP[0]) == pytest.approx(1.0)
    load_LR = placement.rank_load_LR(load_LE, quotas_LP)
    assert load_LR.max() <= lowest_busiest(placement, load_LE[0]) + 1e-3 * load_LR.mean()


@given(placements(max_layers=1), SEEDS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_source_ranks_together_meet_the_quotas(
    placement: Placement, seed: int, drop_some: bool
) -> None:
    quotas_P = np.random.default_rng(seed).random(placement.num_slots)
    if drop_some:
        first_slots = placement.replica_slots(0)[:, 0]
        dropped = np.setdiff1d(np.arange(placement.num_slots)[::2], first_slots)
        quotas_P[dropped] = 0.0
    quotas_P /= expert_sums_E(placement, quotas_P)[placement.slots_LP[0]]
    received_P = np.zeros(placement.num_slots)
    for rank in range(placement.num_ranks):
        slots, thresholds = dispatch_thresholds(placement, 0, quotas_P, rank)
        assert slots.dtype == thresholds.dtype == np.int32
        share = np.diff(thresholds, axis=1, prepend=0) / HASH_RANGE
        assert share.min() >= 0
        assert share[slots < 0].sum() == 0
        assert (thresholds[:, -1] == HASH_RANGE).all()
        assert_keeps_its_own(placement, rank, slots, share, quotas_P)
        np.add.at(received_P, slots[slots >= 0], share[slots >= 0] / placement.num_ranks)
    assert received_P == pytest.approx(quotas_P, abs=1.5 / HASH_RANGE)


def assert_keeps_its_own(
    placement: Placement,
    rank: int,
    slots: NDArray[np.int32],
    share: NDArray[np.float64],
    quotas_P: NDArray[np.float64],
) -> None:
    own = (slots >= 0) & (slots // placement.slots_per_rank == rank)
    kept = np.minimum(1.0, quotas_P[slots[own]] * placement.num_ranks)
    assert share[own] == pytest.approx(kept, abs=1.5 / HASH_RANGE)


def test_a_token_stays_on_its_rank_if_it_may() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
    for rank, expected in ((0, [HASH_RANGE, HASH_RANGE]), (1, [0, HASH_RANGE])):
        _, thresholds = dispatch_thresholds(placement, 0, np.array([0.5, 1, 0.5, 1]), rank)
        assert thresholds[0].tolist() == expected
