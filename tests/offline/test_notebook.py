"""What a notebook imports."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from traces import head_of, write_trace

import ep_rebalance
from ep_rebalance import Placement, plan, replay
from ep_rebalance.offline import notebook, scenarios
from ep_rebalance.placement import imbalance_L
from ep_rebalance.planning.greedy import plan_greedy


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(notebook) == (0, 4)


def skewed(windows: int = 3, layers: int = 2, experts: int = 16) -> np.ndarray:
    return np.random.default_rng(0).zipf(1.7, (windows, layers, experts)).clip(max=1000)


def imbalance(placement: Placement, tokens_WLE: np.ndarray) -> float:
    return float(imbalance_L(placement.rank_load_LR(tokens_WLE.sum(0))).mean())


def test_a_plan_is_more_even_and_has_the_size_that_was_asked_for():
    tokens_WLE = skewed()
    start = plan(np.ones((2, 16)), ranks=4, redundant=4)
    placed = plan(tokens_WLE, ranks=4, redundant=4)
    assert (placed.num_ranks, placed.slots_LP.shape) == (4, (2, 20))
    assert imbalance(placed, tokens_WLE) < imbalance(start, tokens_WLE)


def test_a_current_placement_is_improved_with_few_moves():
    tokens_WLE = skewed()
    current = Placement.contiguous(num_layers=2, num_experts=16, num_ranks=4, num_redundant=4)
    better = plan(tokens_WLE, current=current, max_moved=3)
    assert 0 < better.changed_slots(current) <= 6
    assert imbalance(better, tokens_WLE) < imbalance(current, tokens_WLE)
    assert plan(tokens_WLE, current=current, max_moved=0) == current


def contiguous(experts: int) -> Placement:
    return Placement.contiguous(num_layers=1, num_experts=experts, num_ranks=2)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([[1, 2]], {}, "ranks=8"),
        ([1, 2], {"ranks": 2}, r"not \[2\]"),
        ([[1, -2]], {"ranks": 2}, "not negative"),
        ([[1, 2]], {"ranks": 2, "ranks_per_node": 0}, "1 or more, not 0"),
        ([[1, np.nan]], {"ranks": 2}, "finite"),
        ([[1, 2, 3]], {"ranks": 2}, "3"),
        ([[1, 2]], {"current": contiguous(experts=4)}, "2 experts, the current placement"),
        ([[1, 2]], {"current": contiguous(experts=2), "ranks": 4}, "of 2 ranks, not of 4"),
    ],
)
def test_what_does_not_fit_is_named(tokens, options, words):
    with pytest.raises(ValueError, match=words):
        plan(tokens, **options)


def test_a_trace_is_replayed_as_recorded_and_with_other_sizes(tmp_path: Path):
    write_trace(tmp_path, head_of(experts=16, ranks=4, redundant=4, origin="generated"), 60)
    ours, none = replay(tmp_path), replay(tmp_path, "none")
    assert ours.commits
    assert not none.commits
    assert ours.mean_imbalance < none.mean_imbalance
    assert replay([tmp_path], ranks=2, redundant=0).share_LR.shape == (2, 2)
    with pytest.raises(ValueError, match="no policy 'incremental'; choose from ours, "):
        replay(tmp_path, "incremental")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(ValueError, match=r"no \*\.eptrace in"):
        replay(elsewhere)


def test_a_policy_of_vllm_leaves_the_environment_as_it_is(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "to-be-restored")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    monkeypatch.setattr(scenarios, "planner_of", lambda name: plan_greedy)
    before = dict(os.environ)
    replay(write_trace(tmp_path, head_of(), 4), "vllm")
    assert dict(os.environ) == before


def test_importing_the_package_loads_nothing():
    """Every process of vLLM does."""
    program = "import sys, ep_rebalance; print(len([m for m in sys.modules if 'numpy' in m]))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        ep_rebalance.plans  # noqa: B018


def test_what_is_loaded_when_it_is_asked_for_is_listed_before():
    """So that a notebook completes `ep_rebalance.` with it."""
    program = "import ep_rebalance; print(*dir(ep_rebalance))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    listed = done.stdout.split()
    assert {"Placement", "plan", "replay", "__version__", "__doc__"} <= set(listed)
    assert len(listed) == len(set(listed))
