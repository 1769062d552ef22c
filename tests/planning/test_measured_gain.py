"""Measured gain: what step times tell of a commit, and what they do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.planning.measured_gain import (
    SNAPSHOTS_KEPT,
    MeanStep,
    MeasuredGain,
    StepHistory,
    measured_gain,
)

STEPS = 16
SEEDS = st.integers(0, 2**32 - 1)


def served(
    rng: np.random.Generator,
    count: int,
    *,
    gain: float = 0.0,
    noise: float = 0.0,
    first: int = 0,
    prompts: bool = True,
    drift: float = 0.0,
    decode: tuple[float, float] = (80, 128),
) -> list[MeanStep]:
    """Snapshots of a server whose steps take a constant and their tokens' time. drift: part by which a
    step grows from one snapshot to the next."""
    steps = []
    for moment in range(first, first + count):
        tokens = rng.uniform(*decode)
        prefill = rng.choice([0, 0, 500, 1000]) * rng.uniform(0.5, 1) if prompts else 0.0
        seconds = (0.01 + 1e-5 * prefill + 3e-5 * tokens) * (1 + drift * moment) * (1 - gain)
        steps.append(MeanStep(moment, prefill, tokens, seconds * (1 + noise * rng.normal())))
    return steps


def both_sides(rng: np.random.Generator, count: int = 30, *, gain: float, **traffic):
    before = served(rng, count, **traffic)
    return before, served(rng, count, gain=gain, first=count, **traffic)


@given(SEEDS, st.floats(-0.3, 0.5), st.booleans())
def test_whatever_a_step_carries_the_gain_is_found(seed, gain, prompts):
    rng = np.random.default_rng(seed)
    measured = measured_gain(*both_sides(rng, gain=gain, prompts=prompts))
    assert measured is not None
    assert measured.gain == pytest.approx(gain, abs=1e-3)


@given(SEEDS, st.floats(-0.3, 0.5))
def test_scales_of_time_and_tokens_do_not_matter(seed, gain):
    before, after = both_sides(np.random.default_rng(seed), gain=gain, noise=0.02)
    measured = measured_gain(before, after)
    scaled = measured_gain(
        *(
            [MeanStep(m + 1000, 1e4 * p, 1e4 * d, 50 * s) for m, p, d, s in side]
            for side in (before, after)
        )
    )
    assert measured is not None
    assert scaled is not None
    assert scaled.gain == pytest.approx(measured.gain, abs=1e-6)
    assert scaled.standard_error == pytest.approx(measured.standard_error, rel=1e-3)


def test_the_error_is_what_it_says():
    """Over many servers, deviations from the true gain are as large as the standard errors."""
    rng, off = np.random.default_rng(0), []
    for _ in range(300):
        measured = measured_gain(*both_sides(rng, gain=0.05, noise=0.03))
        assert measured is not None
        off.append((measured.gain - 0.05) / measured.standard_error)
    assert 0.8 < np.std(off) < 1.25
    assert abs(np.mean(off)) < 0.25
    assert np.mean(np.abs(off) > 2) < 0.1


def test_steps_that_grow_with_their_contexts_are_no_loss():
    rng = np.random.default_rng(1)
    measured = measured_gain(*both_sides(rng, gain=0.0, noise=0.005, drift=0.003))
    assert measured is not None
    assert abs(measured.gain) < 3 * measured.standard_error < 0.02


def test_noise_that_lasts_widens_the_error():
    rng = np.random.default_rng(2)
    before, after = both_sides(rng, gain=0.0)
    lasting = np.repeat(rng.normal(0, 0.02, 12), 5)
    shuffled = rng.permutation(lasting)

    def error(noise_N):
        sides = iter(noise_N)
        noisy = [[step._replace(seconds=step.seconds * (1 + next(sides))) for step in side]
                 for side in (before, after)]  # fmt: skip
        measured = measured_gain(*noisy)
        assert measured is not None
        return measured.standard_error

    assert error(lasting) > 1.5 * error(shuffled)


def test_a_few_stalls_change_little():
    rng = np.random.default_rng(3)
    before, after = both_sides(rng, gain=0.1, noise=0.01)
    for index in (3, 11, 20):
        after[index] = after[index]._replace(seconds=5 * after[index].seconds)
    measured = measured_gain(before, after)
    assert measured is not None
    assert measured.gain == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"count": 30}, {"count": 0}, id="nothing after"),
        pytest.param({"count": 30}, {"count": 4}, id="hardly anything after"),
        pytest.param({"count": 5}, {"count": 5}, id="too few for so many unknowns"),
        pytest.param({"count": 30}, {"count": 30, "decode": (400, 500)}, id="other batch sizes"),
        pytest.param(
            {"count": 30, "prompts": False}, {"count": 30, "decode": (8, 9)}, id="smaller"
        ),
    ],
)
def test_too_few_steps_that_are_alike_tell_nothing(before, after):
    rng = np.random.default_rng(4)
    assert measured_gain(served(rng, **before), served(rng, first=30, **after)) is None


def test_tokens_that_changed_with_the_commit_leave_nothing_to_tell():
    """The gain and the tokens' price cannot be told apart."""
    before = [MeanStep(i, 0.0, 100.0, 0.020) for i in range(10)]
    after = [MeanStep(10 + i, 0.0, 105.0, 0.019) for i in range(10)]
    assert measured_gain(before, after) is None


def test_a_promise_counts_as_kept_unless_the_gain_is_surely_below_it():
    told, vague = (MeasuredGain(gain=0.02, standard_error=error) for error in (0.005, 0.03))
    assert told.bounds == (pytest.approx(0.01), pytest.approx(0.03))
    assert told.part_kept(0.1) == pytest.approx(0.2)
    for measured, promised in ((told, 0.03), (vague, 0.1), (told, 0.0)):
        assert math.isinf(measured.part_kept(promised))


# --- the history


def sample(generation: int, step_seconds: float, tokens: int = 100) -> LoadSample:
    counts_ALE = np.zeros((len(PHASES), 2, 4), dtype=np.int64)
    counts_ALE[PHASES.index("decode"), :, 0] = tokens * STEPS
    return LoadSample(
        counts_ALE=counts_ALE, steps=STEPS, step_seconds=step_seconds, generation=generation
    )


def history(*generations: tuple[int, list[float]]) -> StepHistory:
    seen = StepHistory()
    for generation, seconds in generations:
        seen.add([sample(generation, each, 100 + index % 7) for index, each in enumerate(seconds)])
    return seen


def test_the_newest_commit_is_held_against_the_generation_before_it():
    seen = history((0, [9.0] * 20), (1, [0.02] * 20), (2, [0.018] * 20))
    measured = seen.gain()
    assert measured is not None
    assert measured.gain == pytest.approx(0.1)


def test_the_snapshot_that_the_migration_fell_into_is_left_out():
    assert history((1, [0.02] * 20), (2, [0.018] * 5)).gain() is None
    measured = history((1, [0.02] * 20), (2, [0.5] + [0.018] * 5)).gain()
    assert measured is not None
    assert measured.gain == pytest.approx(0.1)


def test_snapshots_that_were_not_timed_are_left_out():
    measured = history((1, [0.02, 0.0] * 20), (2, [0.018, 0.0] * 20)).gain()
    assert measured is not None
    assert measured.gain == pytest.approx(0.1)


def test_only_snapshots_near_the_commit_count():
    near = SNAPSHOTS_KEPT
    seen = history((1, [0.09] * 50 + [0.02] * near), (2, [0.018] * (near + 1) + [0.09] * 50))
    measured = seen.gain()
    assert measured is not None
    assert measured.gain == pytest.approx(0.1)


def test_before_the_first_commit_there_is_nothing_to_tell():
    assert history().gain() is None
    assert history((5, [0.02] * 30)).gain() is None
