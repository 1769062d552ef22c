from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from shapes import Samples

from ep_rebalance.planning.incremental.load_vectors import load_vectors

RANKS, EXPERTS = 4, 24


def second_moments(cost_WE: Samples, weight_W: NDArray[np.float64]) -> NDArray[np.float64]:
    """As the load vectors tell them."""
    vectors_EV, own_E = load_vectors(cost_WE, weight_W, RANKS)
    return vectors_EV @ vectors_EV.T + np.diag(own_E)


def raw_second_moments(cost_WE: Samples) -> NDArray[np.float64]:
    """Of samples with equal totals, without anything shrunk."""
    load_WE = cost_WE * RANKS / cost_WE.sum(axis=1, keepdims=True)
    return load_WE.T @ load_WE / len(load_WE)


def two_moods(samples: int) -> Samples:
    """Skewed experts, each of which is busy in every second sample only; next to no noise."""
    popularity_E = np.exp(np.random.default_rng(1).standard_normal(EXPERTS))
    mood_E = np.where(np.arange(EXPERTS) % 2, 1.4, 0.6)
    odd_W1 = np.arange(samples)[:, None] % 2
    cost_WE = popularity_E * np.where(odd_W1, mood_E, 2.0 - mood_E)
    return 1e9 * cost_WE / cost_WE.sum(axis=1, keepdims=True)


def noise(seed: int) -> Samples:
    """Counts of experts that are all alike."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(40 * EXPERTS, np.full(EXPERTS, 1 / EXPERTS), size=16)
    return counts.astype(np.float64)


def test_inner_products_approach_the_second_moments_as_noise_vanishes() -> None:
    def error(samples: int) -> float:
        cost_WE = two_moods(samples)
        raw_EE = raw_second_moments(cost_WE)
        told_EE = second_moments(cost_WE, np.ones(samples))
        return float(np.linalg.norm(told_EE - raw_EE) / np.linalg.norm(raw_EE))

    assert error(256) < error(16) < 0.1
    assert error(256) < 0.005


def test_load_is_in_units_of_the_mean_rank_load() -> None:
    vectors_EV, _ = load_vectors(two_moods(16), np.ones(16), RANKS)
    assert vectors_EV.shape == (EXPERTS, 17)
    assert vectors_EV[:, 0].sum() == pytest.approx(RANKS)


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_looks_even_and_unrelated(seed: int) -> None:
    cost_WE = noise(seed)
    vectors_EV, own_E = load_vectors(cost_WE, np.ones(16), RANKS)
    assert vectors_EV[:, 0] == pytest.approx(RANKS / EXPERTS, rel=0.02)
    raw_EE = np.cov(cost_WE.T * RANKS / (40 * EXPERTS), bias=True)
    told_EE = vectors_EV[:, 1:] @ vectors_EV[:, 1:].T
    assert np.linalg.norm(told_EE) < 0.05 * np.linalg.norm(raw_EE)
    assert own_E.sum() < 0.2 * np.trace(raw_EE)


def test_what_each_expert_does_alone_is_its_own() -> None:
    """Every expert wavers independently: much variance, no covariance to speak of."""
    generator = np.random.default_rng(0)
    cost_WE = 1e6 * generator.uniform(0.2, 1.8, size=(16, EXPERTS))
    vectors_EV, own_E = load_vectors(cost_WE, np.ones(16), RANKS)
    shared = np.sum(vectors_EV[:, 1:] ** 2)
    assert own_E.min() > 0
    assert own_E.sum() > 4 * shared


def test_zero_load_gives_zeros() -> None:
    vectors_EV, own_E = load_vectors(np.zeros((3, EXPERTS)), np.ones(3), RANKS)
    assert not vectors_EV.any()
    assert not own_E.any()


@pytest.mark.parametrize("cost_WE", [two_moods(7), noise(0), noise(1)[:1]])
def test_samples_without_tokens_or_weight_do_not_matter(cost_WE: Samples) -> None:
    samples = len(cost_WE)
    known_EE = second_moments(cost_WE, np.ones(samples))
    idle_WE = np.insert(cost_WE, [0, samples], 0.0, axis=0)
    assert second_moments(idle_WE, np.ones(samples + 2)) == pytest.approx(known_EE)
    strange_WE = np.insert(cost_WE, 1, 1e6 * np.arange(EXPERTS), axis=0)
    weight_W = np.insert(np.ones(samples), 1, 0.0)
    assert second_moments(strange_WE, weight_W) == pytest.approx(known_EE)


def test_older_samples_count_by_their_weight() -> None:
    cost_WE = 1e9 * np.stack([np.arange(1.0, EXPERTS + 1), np.arange(EXPERTS, 0.0, -1)])
    vectors_EV, _ = load_vectors(cost_WE, np.array([0.01, 1.0]), RANKS)
    assert (np.diff(vectors_EV[:, 0]) < 0).all()
