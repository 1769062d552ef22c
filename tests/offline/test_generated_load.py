from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from ep_rebalance.offline.generated_load import TIMINGS, Timing, generate_steps, synthetic_domains

STILL = Timing(drift=0.0, wavering=0.0)
DOMAINS = synthetic_domains(domains=3, layers=2, experts=16, seed=7)


def steps_of(timing: Timing, count: int, *, pairs: int = 2000, seed: int = 0) -> np.ndarray:
    return np.stack(
        list(islice(generate_steps(DOMAINS, timing, pairs_per_step=pairs, seed=seed), count))
    )


@pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)
def test_the_same_seed_repeats_and_another_does_not(timing: Timing) -> None:
    steps_NLE = steps_of(timing, 20)
    assert (steps_of(timing, 20) == steps_NLE).all()
    assert (steps_of(timing, 20, seed=1) != steps_NLE).any()
    again = synthetic_domains(domains=3, layers=2, experts=16, seed=7)
    assert (again == DOMAINS).all()


@pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)
def test_every_layer_of_every_step_gets_all_pairs(timing: Timing) -> None:
    steps_NLE = steps_of(timing, 20, pairs=123)
    assert steps_NLE.shape == (20, 2, 16)
    assert steps_NLE.min() >= 0
    assert (steps_NLE.sum(axis=2) == 123).all()


def test_still_load_has_the_marginals_of_its_domains() -> None:
    load_LE = steps_of(STILL, 50, pairs=100_000).mean(axis=0) / 100_000
    assert load_LE == pytest.approx(DOMAINS.mean(axis=0), rel=0.02)


def test_drift_moves_the_load_and_steady_load_stays_near_its_mean() -> None:
    def change(timing: Timing) -> float:
        first, *_, last = steps_of(timing, 400, pairs=100_000)
        return float(np.abs(first - last).sum() / 200_000)

    assert change(STILL) < 0.03
    assert change(STILL) < change(TIMINGS["steady"]) < change(TIMINGS["drift"])


def test_a_burst_is_led_by_one_domain() -> None:
    timing = Timing(drift=0.0, wavering=0.0, burst_steps=30.0)
    steps_NLE = steps_of(timing, 300, pairs=100_000) / 100_000
    distance_ND = np.abs(steps_NLE[:, None] - DOMAINS).mean(axis=(2, 3))
    leader_N = distance_ND.argmin(axis=1)
    assert distance_ND.min(axis=1).max() < 0.5 * np.median(distance_ND)
    assert 2 <= np.count_nonzero(np.diff(leader_N)) <= 20


def test_domains_are_skewed_and_share_the_part_they_should() -> None:
    domains_DLE = synthetic_domains(domains=2, layers=8, experts=512, seed=0, shared=0.5)
    assert domains_DLE.sum(axis=2) == pytest.approx(1.0)
    variation = domains_DLE.std(axis=2) / domains_DLE.mean(axis=2)
    assert variation.mean() == pytest.approx(1.3, abs=0.15)
    first, second = np.log(domains_DLE).reshape(2, -1)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.5, abs=0.05)
    even = synthetic_domains(domains=2, layers=1, experts=4, seed=0, spread=0.0)
    assert even == pytest.approx(0.25)
