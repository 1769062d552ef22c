from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_rebalance.load.window import PHASES, LoadSample, LoadWindow, window_load


def sample(tokens: int, *, steps: int = 1, step_seconds: float = 0.1) -> LoadSample:
    """One layer, two experts: `tokens` in prefill at expert 0, twice as many in decode at expert 1."""
    counts_ALE = np.zeros((len(PHASES), 1, 2), dtype=np.int64)
    counts_ALE[0, 0, 0] = tokens
    counts_ALE[1, 0, 1] = 2 * tokens
    return LoadSample(counts_ALE=counts_ALE, steps=steps, step_seconds=step_seconds)


def tokens_of(window: LoadWindow) -> list[int]:
    """Prefill tokens of the samples that the window keeps."""
    return [int(kept.counts_ALE[0, 0, 0]) for kept in window.samples()]


def test_only_the_newest_are_kept_oldest_first() -> None:
    window = LoadWindow(2)
    for tokens in (1, 2, 3):
        window.append(sample(tokens))
    assert len(window) == 2
    assert tokens_of(window) == [2, 3]


def test_idle_snapshots_push_nothing_out() -> None:
    window = LoadWindow(2)
    for tokens in (1, 0, 2, 0):
        window.append(sample(tokens))
    assert tokens_of(window) == [1, 2]


def test_samples_taken_stay_as_they_were() -> None:
    window = LoadWindow(1)
    window.append(sample(1))
    taken = window.samples()
    window.append(sample(2))
    assert [kept.routed for kept in taken] == [3]


def test_routed_is_of_the_busiest_layer() -> None:
    counts_ALE = np.array([[[1, 2], [10, 0]], [[3, 4], [0, 5]]])
    window = LoadWindow(4)
    for _ in range(2):
        window.append(LoadSample(counts_ALE=counts_ALE, steps=1, step_seconds=0.1))
    assert window.samples()[0].routed == 15
    assert window.routed == 30


def test_step_seconds_is_the_mean_over_steps() -> None:
    window = LoadWindow(4)
    assert window.step_seconds == 0.0
    window.append(sample(1, steps=1, step_seconds=0.4))
    window.append(sample(1, steps=3, step_seconds=0.2))
    assert window.step_seconds == pytest.approx(0.25)


def test_an_empty_window_has_no_load() -> None:
    window = LoadWindow(2)
    window.append(sample(1))
    window.clear()
    assert (len(window), window.routed, window.samples()) == (0, 0, ())
    with pytest.raises(ValueError, match="no snapshot"):
        window_load(window.samples())


def test_sizes_must_fit() -> None:
    window = LoadWindow(2)
    window.append(sample(1))
    other = LoadSample(counts_ALE=np.ones((2, 1, 3), dtype=np.int64), steps=1, step_seconds=0.1)
    with pytest.raises(ValueError, match="does not fit"):
        window.append(other)
    with pytest.raises(ValueError, match="phases"):
        LoadSample(counts_ALE=np.ones((1, 1, 3), dtype=np.int64), steps=1, step_seconds=0.1)
    with pytest.raises(ValueError, match="at least one"):
        LoadWindow(0)


def test_phases_are_summed_or_chosen() -> None:
    samples = [sample(1), sample(5, steps=4)]
    both = window_load(samples)
    assert both.tokens_WLE.tolist() == [[[1.0, 2.0]], [[5.0, 10.0]]]
    assert both.steps_W.tolist() == [1, 4]
    assert both.load_LE.tolist() == [[6, 12]]
    assert window_load(samples, phases=["decode"]).load_LE.tolist() == [[0, 12]]
    assert window_load(samples, phases=["prefill"]).load_LE.tolist() == [[6, 0]]


def test_a_sample_counts_half_after_the_half_life() -> None:
    load = window_load([sample(8)] * 5, half_life=2.0)
    assert load.weight_W == pytest.approx([1 / 4, 2**-1.5, 1 / 2, 2**-0.5, 1])
    assert load.load_LE[0] == pytest.approx(load.weight_W.sum() * np.array([8, 16]))
    assert window_load([sample(8)] * 5).weight_W.tolist() == [1] * 5


def test_the_older_half_of_a_long_window_is_grouped() -> None:
    load = window_load([sample(n) for n in range(1, 9)], half_life=1.0, max_samples=4)
    assert load.tokens_WLE[:, 0, 0].tolist() == [1 + 2 + 3, 4 + 5 + 6, 7, 8]
    assert load.steps_W.tolist() == [3, 3, 1, 1]
    assert load.weight_W == pytest.approx([2.0**-6, 2.0**-3, 1 / 2, 1])


@given(st.integers(1, 60), st.integers(2, 30))
def test_grouping_keeps_all_tokens_and_the_order(count: int, most: int) -> None:
    load = window_load([sample(n) for n in range(1, count + 1)], half_life=5.0, max_samples=most)
    assert len(load.weight_W) == len(load.steps_W) == min(count, most)
    assert load.tokens_WLE[:, 0, 0].sum() == count * (count + 1) / 2
    assert load.steps_W.sum() == count
    assert (np.diff(load.weight_W) > 0).all()
    assert load.weight_W[-1] == 1.0
    assert load.tokens_WLE[-1, 0, 0] == count
