"""What is remembered of load that has left the window."""

import numpy as np
import pytest

from ep_rebalance.load.history import HALF_LIFE_SAMPLES, LOADS, LoadHistory
from ep_rebalance.load.window import WindowLoad

KINDS_KE = np.array([[8.0, 1, 1, 1, 1], [1.0, 8, 1, 1, 1], [1.0, 1, 1, 1, 8]]) / 12.0


def window(tokens_WLE, weight_W=None) -> WindowLoad:
    tokens_WLE = np.array(tokens_WLE, dtype=np.float64)
    count = len(tokens_WLE)
    return WindowLoad(
        tokens_WLE=tokens_WLE,
        weight_W=np.ones(count) if weight_W is None else np.array(weight_W),
        steps_W=np.full(count, 4.0),
    )


def remembering(samples: int, seed: int = 0) -> LoadHistory:
    """Samples of the kinds in turn, 2 layers alike, 6,000 tokens each."""
    random, memory = np.random.default_rng(seed), LoadHistory()
    for number in range(samples):
        tokens_LE = random.multinomial(6000, KINDS_KE[number % 3], size=2)
        memory.add(window([tokens_LE]))
    return memory


def remembered(memory: LoadHistory, share: float = 0.5) -> WindowLoad:
    """The memory beside one recent sample, without it."""
    joined = memory.joined(window([np.ones((2, 5))]), share)
    return WindowLoad(
        tokens_WLE=joined.tokens_WLE[:-1],
        weight_W=joined.weight_W[:-1],
        steps_W=joined.steps_W[:-1],
    )


def test_without_memory_the_recent_load_stays_as_it_is():
    recent = window([np.ones((2, 5))])
    assert LoadHistory().joined(recent, 0.5) is recent
    assert remembering(3).joined(recent, 0.0) is recent


@pytest.mark.parametrize("samples", [1, LOADS, LOADS + 1, 60])
def test_a_bounded_number_of_sums_holds_all_tokens_and_steps(samples):
    load = remembered(remembering(samples))
    assert len(load.tokens_WLE) == min(samples, LOADS)
    kept = (0.5 ** (np.arange(samples) / HALF_LIFE_SAMPLES)).sum()
    assert load.steps_W.sum() == pytest.approx(4.0 * kept)
    assert load.tokens_WLE.sum() == pytest.approx(12_000 * kept)


def test_only_loads_that_are_alike_are_summed_up():
    load = remembered(remembering(200))
    shares_WE = load.tokens_WLE[:, 0] / load.tokens_WLE[:, 0].sum(axis=1, keepdims=True)
    distance_WK = np.abs(shares_WE[:, None] - KINDS_KE).max(axis=2)
    assert (distance_WK.min(axis=1) < 0.02).all()
    assert set(distance_WK.argmin(axis=1)) == {0, 1, 2}


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_the_memory_makes_up_its_share_of_the_weighted_tokens(share):
    recent = window([np.full((2, 5), 30.0), np.full((2, 5), 10.0)], weight_W=[0.5, 1.0])
    joined = remembering(40).joined(recent, share)
    weighted_W = joined.weight_W * joined.tokens_WLE.sum(axis=(1, 2))
    assert weighted_W[:-2].sum() / weighted_W.sum() == pytest.approx(share)
    assert joined.tokens_WLE[-2:].tolist() == recent.tokens_WLE.tolist()
    assert joined.weight_W[-2:].tolist() == [0.5, 1.0]


def test_a_short_memory_counts_for_less():
    recent = window(np.full((4, 2, 5), 10.0))
    weighted = [
        float(load.weight_W[:-4] @ load.tokens_WLE[:-4].sum(axis=(1, 2)))
        for load in (remembering(count).joined(recent, 0.5) for count in (1, 2, 4, 8))
    ]
    assert weighted == pytest.approx([100.0, 200.0, 400.0, 400.0])


def test_what_was_added_is_not_changed():
    tokens_WLE = np.full((2, 2, 5), 7.0)
    memory = LoadHistory()
    for _ in range(10):
        memory.add(window(tokens_WLE))
    assert (tokens_WLE == 7.0).all()


def test_samples_without_tokens_are_not_remembered():
    memory, recent = LoadHistory(), window([np.ones((2, 5))])
    for _ in range(2 * LOADS):
        memory.add(window([np.zeros((2, 5))]))
    assert memory.joined(recent, 0.5) is recent
    memory.add(window([np.zeros((2, 5)), np.ones((2, 5))]))
    joined = memory.joined(recent, 0.5)
    assert np.isfinite(joined.weight_W).all()
    assert len(joined.tokens_WLE) == 2
