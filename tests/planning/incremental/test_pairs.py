"""Layers of ranks with two slots each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import SEEDS, budget_of, problem_of, random_samples, random_slots

from ep_rebalance.placement import Placement
from ep_rebalance.planning.alignment import align
from ep_rebalance.planning.incremental.pairs import SHARPNESS, improve_pairs, soft_maximum
from ep_rebalance.planning.incremental.planner import MANY_PAIRS, _apply, plan_incremental
from ep_rebalance.planning.problem import Problem

Slots = NDArray[np.int32]
LEAST = 1e-4


def even_parts(load_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [E, 8]: what a replica of each expert bears, by their number; column 0 has no meaning."""
    return load_E[:, None] / np.maximum(np.arange(8), 1)


def rank_loads(load_E: NDArray[np.float64], slots_P: Slots) -> NDArray[np.float64]:
    replicas_E = np.bincount(slots_P, minlength=len(load_E))
    return (load_E[slots_P] / replicas_E[slots_P]).reshape(-1, 2).sum(axis=1)


def objective(load_E: NDArray[np.float64], slots_P: Slots) -> float:
    return float(np.logaddexp.reduce(SHARPNESS * rank_loads(load_E, slots_P)) / SHARPNESS)


def is_placement(slots_P: Slots, num_experts: int) -> bool:
    return len(set(slots_P.tolist())) == num_experts and all(
        first != second for first, second in slots_P.reshape(-1, 2).tolist()
    )


def arrivals_R(before_P: Slots, after_P: Slots) -> list[int]:
    pairs = zip(before_P.reshape(-1, 2).tolist(), after_P.reshape(-1, 2).tolist(), strict=True)
    return [len(set(after) - set(before)) for before, after in pairs]


@st.composite
def layers(draw: st.DrawFn) -> tuple[NDArray[np.float64], Slots]:
    """Loads in mean rank loads, often with many that are equal, and slots."""
    ranks = draw(st.integers(2, 9))
    experts = draw(st.integers(max(2, ranks), 2 * ranks))
    random = np.random.default_rng(draw(SEEDS))
    load_E = random.exponential(1.0, experts)
    if draw(st.booleans()):
        load_E = random.integers(0, 4, experts).astype(np.float64)
    slots_P = np.array(random_slots(random, ranks, 2, experts), dtype=np.int32)
    return load_E * ranks / max(load_E.sum(), 1.0), slots_P


@given(layers(), st.integers(0, 8) | st.just(99), st.integers(1, 3))
@settings(max_examples=200)
def test_changes_keep_the_bounds_and_gain_what_they_say(
    layer: tuple[NDArray[np.float64], Slots], max_moved: int, max_arrivals: int
) -> None:
    load_E, origin_P = layer
    changes_N4, gains_N2 = improve_pairs(
        even_parts(load_E), origin_P, max_moved, max_arrivals, LEAST
    )
    slots_P, moved = origin_P.copy(), 0
    for change_4, (gain, _) in zip(changes_N4, gains_N2, strict=True):
        before = objective(load_E, slots_P)
        _apply(slots_P, change_4[None])
        assert is_placement(slots_P, len(load_E))
        assert gain == pytest.approx(before - objective(load_E, slots_P), abs=1e-9)
        moved += int(change_4[0])
        arrived_R = arrivals_R(origin_P, slots_P)
        assert sum(arrived_R) == moved <= max_moved
        assert max(arrived_R) <= max_arrivals
    assert (np.diff(gains_N2[:, 1]) <= 1e-12).all()
    assert (gains_N2[:, 1] > LEAST).all()
    gained = objective(load_E, origin_P) - objective(load_E, slots_P)
    assert gained >= LEAST * moved - 1e-9


def best_of_all(load_E: NDArray[np.float64], num_ranks: int) -> float:
    """The least soft maximum of all placements, tried one by one."""
    pairs = list(itertools.combinations(range(len(load_E)), 2))
    found = (
        np.array(chosen, dtype=np.int32).reshape(-1)
        for chosen in itertools.combinations_with_replacement(pairs, num_ranks)
    )
    return min(
        objective(load_E, slots_P) for slots_P in found if is_placement(slots_P, len(load_E))
    )


@pytest.mark.parametrize(("ranks", "experts"), [(3, 5), (3, 6), (4, 6), (4, 7)])
def test_without_a_budget_it_comes_near_the_best_of_all_placements(
    ranks: int, experts: int
) -> None:
    missing = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        load_E = random.exponential(1.0, experts)
        load_E *= ranks / load_E.sum()
        slots_P = np.array(random_slots(random, ranks, 2, experts), dtype=np.int32)
        start, best = objective(load_E, slots_P), best_of_all(load_E, ranks)
        changes_N4, _ = improve_pairs(even_parts(load_E), slots_P, 99, 2, 1e-9)
        _apply(slots_P, changes_N4)
        reached = objective(load_E, slots_P)
        assert best - 1e-9 <= reached <= start + 1e-9
        missing.append(reached / best - 1.0)
    assert np.mean(missing) < 0.06
    assert np.median(missing) < 0.02


def test_a_replica_and_the_swap_that_makes_it_pay_come_together() -> None:
    """One more replica of expert 0 has no light neighbour at first: alone it makes the layer worse."""
    load_E = np.array([1.5, 0.05, 0.2, 0.95, 0.9, 0.4, 0.1])
    origin_P = np.array([0, 1, 2, 3, 2, 4, 5, 6], dtype=np.int32)
    copied_P = np.array([0, 1, 2, 3, 0, 4, 5, 6], dtype=np.int32)
    assert objective(load_E, copied_P) > objective(load_E, origin_P)
    changes_N4, gains_N2 = improve_pairs(even_parts(load_E), origin_P, 99, 2, LEAST)
    slots_P = origin_P.copy()
    _apply(slots_P, changes_N4)
    assert changes_N4[0].tolist() == [1, 4, -1, 0]
    assert gains_N2[0, 0] < 0.0 < gains_N2[0, 1] == gains_N2[1, 1]
    assert rank_loads(load_E, slots_P).max() < 1.3 < rank_loads(load_E, origin_P).max()


def test_the_soft_maximum_is_the_maximum_and_what_others_add() -> None:
    assert soft_maximum(np.array([3.0, 1.0])) == pytest.approx(3.0)
    assert soft_maximum(np.full(8, 90.0)) == pytest.approx(90.0 + np.log(8) / SHARPNESS)


@st.composite
def many_pairs(draw: st.DrawFn) -> Problem:
    ranks, redundant = draw(st.integers(MANY_PAIRS, 40)), draw(st.integers(0, 12))
    random = np.random.default_rng(draw(SEEDS))
    experts = 2 * ranks - redundant
    slots_LP = np.stack([random_slots(random, ranks, 2, experts) for _ in range(3)])
    current = Placement(slots_LP.astype(np.int32), experts, ranks)
    fraction, arrivals = draw(st.sampled_from([0.03, 0.1, 1.0])), draw(st.integers(1, 2))
    return problem_of(
        random_samples(draw(SEEDS), current),
        current,
        budget=budget_of(current, fraction=fraction, arrivals=arrivals),
    )


@given(many_pairs())
@settings(max_examples=60, deadline=None)
def test_plans_are_aligned_within_the_budget_and_the_same_again(problem: Problem) -> None:
    current, budget = problem.current, problem.budget
    target = plan_incremental(problem)
    changed_LP = target.slots_LP != current.slots_LP
    assert changed_LP.sum() <= budget.max_moved_slots
    assert changed_LP.reshape(3, current.num_ranks, 2).sum(axis=2).max() <= budget.max_arrivals
    assert (align(target.slots_LP, current.slots_LP, current.num_ranks) == target.slots_LP).all()
    assert plan_incremental(problem) == target


def test_an_idle_layer_of_pairs_stays() -> None:
    current = Placement.contiguous(
        num_layers=2, num_experts=28, num_ranks=MANY_PAIRS, num_redundant=4
    )
    samples_WLE = random_samples(0, current)
    samples_WLE[:, 0] = 0.0
    changed_LP = plan_incremental(problem_of(samples_WLE, current)).slots_LP != current.slots_LP
    assert not changed_LP[0].any()
    assert changed_LP[1].any()


@pytest.mark.parametrize("max_moved", [0, 2, 40])
def test_an_expert_as_heavy_as_fifty_ranks_is_planned_for(max_moved: int) -> None:
    """Its exponential is 0, by which nothing can be divided."""
    slots_P = (np.arange(192) % 96).astype(np.int32)
    load_E = np.random.default_rng(0).exponential(0.01, 96)
    load_E[5:7] = 90.0, 80.0
    changes_N4, gains_N2 = improve_pairs(even_parts(load_E), slots_P, max_moved, 2, LEAST)
    assert np.isfinite(gains_N2).all()
    after_P = slots_P.copy()
    _apply(after_P, changes_N4)
    assert is_placement(after_P, 96)
    assert changes_N4[:, 0].sum() <= max_moved
    assert (len(changes_N4) > 0) == (max_moved > 0)
