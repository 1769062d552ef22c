"""The load from random routers that `benchmarks/planning.py` judges policies by."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ep_rebalance.offline.model_shape import SHAPES

SHAPE = replace(SHAPES["deepseek-v3"], layers=3, experts=32, top_k=4)
RANKS = 4


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import planning_router

    monkeypatch.delitem(sys.modules, "planning_router")
    return planning_router


def steps_of(
    router: ModuleType, load: str, count: int, *, seed: int = 0, tokens: int = 64
) -> np.ndarray:
    steps = router.router_steps(
        SHAPE, router.ARRIVALS[load], ranks=RANKS, tokens_per_rank=tokens, seed=seed
    )
    return np.stack(list(itertools.islice(steps, count)))


@pytest.mark.parametrize("load", ["router", "router burst"])
@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_no_token_has_an_expert_twice(router: ModuleType, load: str, tokens: int) -> None:
    steps_NLE = steps_of(router, load, 10, tokens=tokens)
    assert (steps_NLE.sum(axis=2) == RANKS * tokens * SHAPE.top_k).all()
    assert steps_NLE.min() >= 0
    assert steps_NLE.max() <= RANKS * tokens


def test_the_same_seed_repeats_and_another_does_not(router: ModuleType) -> None:
    first, again, other = (steps_of(router, "router", 5, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_load_keeps_for_a_while_and_then_shifts(router: ModuleType) -> None:
    """Neighbouring windows are alike, those far apart less so, and with bursts all differ more."""

    def changes(load: str) -> tuple[float, float]:
        windows = steps_of(router, load, 960, tokens=256).reshape(20, 48, 3, 32).sum(axis=1)
        shares = windows / windows.sum(axis=2, keepdims=True)
        near, far = (np.abs(shares[apart:] - shares[:-apart]).sum(axis=2) for apart in (1, 8))
        return float(near.mean()), float(far.mean())

    near, far = changes("router")
    assert 0.0 < near < far
    assert changes("router burst") > (near, far)


def test_some_experts_are_chosen_together(router: ModuleType) -> None:
    """A random router on clustered text: the bank's tokens choose some pairs far more often than by lot."""
    bank_XBLK = router._token_bank(SHAPE, np.random.default_rng(0))
    chosen = np.zeros((bank_XBLK.shape[0] * bank_XBLK.shape[1], SHAPE.experts))
    np.put_along_axis(chosen, bank_XBLK[:, :, 0].reshape(len(chosen), -1).astype(np.int64), 1.0, 1)
    assert (chosen.sum(axis=1) == SHAPE.top_k).all()
    together = chosen.T @ chosen / len(chosen)
    popular = chosen.mean(axis=0)
    lift = together / np.outer(popular, popular)
    assert lift[~np.eye(SHAPE.experts, dtype=bool)].max() > 2.0
