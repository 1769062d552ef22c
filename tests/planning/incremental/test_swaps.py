"""The best swap, held against all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from small_layers import ROUNDING, VISIBLE, Scene, scenes

from ep_rebalance.planning.incremental.layer import Change
from ep_rebalance.planning.incremental.relief import relief_of
from ep_rebalance.planning.incremental.swaps import best_swap


def search(scene: Scene, best: Change) -> Change:
    relief = relief_of(scene.experts, scene.layer, scene.rank)
    return best_swap(scene.experts, scene.layer, relief, scene.left, scene.max_arrivals, best)


def swaps(scene: Scene, slack: float) -> list[Change]:
    """The allowed swaps of the rank with those no more than `slack` above the average."""
    small, slots_P = scene.small, scene.layer.slots_P
    square_R = small.square_R(slots_P)
    others = np.flatnonzero(square_R <= square_R.mean() + slack).tolist()
    changes = small.swaps(slots_P, scene.rank, others)
    return small.scored(slots_P, changes, scene.left, scene.max_arrivals)


@given(scenes())
@settings(max_examples=400)
def test_the_best_swap_with_a_rank_below_the_average_is_found(scene: Scene) -> None:
    best = search(scene, scene.nothing())
    scene.check(best, swaps(scene, -ROUNDING), swaps(scene, ROUNDING))


@given(scenes())
@settings(max_examples=150)
def test_only_a_better_swap_takes_the_place_of_another_change(scene: Scene) -> None:
    """A change of the same gain per move stays; one slightly worse goes."""
    first = search(scene, scene.nothing())
    if first.slot < 0 or first.gain_per_move < VISIBLE:
        return
    known = Change(first.gain_per_move, 1.0, 1, 0, -1, 0)
    assert search(scene, known) == known
    worse = known._replace(gain_per_move=first.gain_per_move * (1.0 - 1e-6))
    better = search(scene, worse)
    assert better != worse
    assert better.gain_per_move == pytest.approx(first.gain_per_move, rel=1e-6)
