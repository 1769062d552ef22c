from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.load_window import PHASES, LoadSample, LoadWindow


def sample(tokens: int, *, steps: int = 1, step_seconds: float = 0.1) -> LoadSample:
    """One layer, two experts: `tokens` in prefill at expert 0, twice as many in decode at expert 1."""
    counts_ALE = np.zeros((len(PHASES), 1, 2), dtype=np.int64)
    counts_ALE[0, 0, 0] = tokens
    counts_ALE[1, 0, 1] = 2 * tokens
    return LoadSample(counts_ALE=counts_ALE, steps=steps, step_seconds=step_seconds)


def test_phases_are_summed_oldest_first() -> None:
    window = LoadWindow(4)
    window.append(sample(1))
    window.append(sample(5))
    assert window.samples_WLE().tolist() == [[[1.0, 2.0]], [[5.0, 10.0]]]
    assert window.load_LE().tolist() == [[6, 12]]
    assert window.tokens == 18


def test_only_the_newest_are_kept() -> None:
    window = LoadWindow(2)
    for tokens in (1, 2, 3):
        window.append(sample(tokens))
    assert len(window) == 2
    assert window.load_LE().tolist() == [[5, 10]]


def test_idle_snapshots_push_nothing_out() -> None:
    window = LoadWindow(2)
    for tokens in (1, 0, 2, 0):
        window.append(sample(tokens))
    assert window.load_LE().tolist() == [[3, 6]]


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
    assert (len(window), window.tokens) == (0, 0)
    with pytest.raises(ValueError, match="no snapshot"):
        window.samples_WLE()
    with pytest.raises(ValueError, match="no snapshot"):
        window.load_LE()


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
