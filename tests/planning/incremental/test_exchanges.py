"""The best copy and the best drop, held against all of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from small_layers import VISIBLE, Scene, scenes

from ep_rebalance.planning.incremental.exchanges import best_copy, best_drop
from ep_rebalance.planning.incremental.layer import Change
from ep_rebalance.planning.incremental.relief import relief_of


def copy(scene: Scene, best: Change) -> Change:
    relief = relief_of(scene.experts, scene.layer, scene.rank)
    return best_copy(scene.experts, scene.layer, relief, scene.left, scene.max_arrivals, best)


def drop(scene: Scene, best: Change) -> Change:
    relief = relief_of(scene.experts, scene.layer, scene.rank)
    return best_drop(scene.experts, scene.layer, relief, scene.left, scene.max_arrivals, best)


@given(scenes())
@settings(max_examples=400)
def test_the_best_copy_is_found(scene: Scene) -> None:
    small, slots_P = scene.small, scene.layer.slots_P
    changes = small.copies(slots_P, scene.rank)
    copies = small.scored(slots_P, changes, scene.left, scene.max_arrivals)
    scene.check(copy(scene, scene.nothing()), copies, copies)


@given(scenes())
@settings(max_examples=400)
def test_the_best_drop_is_found(scene: Scene) -> None:
    small, slots_P = scene.small, scene.layer.slots_P
    changes = small.drops(slots_P, scene.rank)
    drops = small.scored(slots_P, changes, scene.left, scene.max_arrivals)
    scene.check(drop(scene, scene.nothing()), drops, drops)


@given(scenes())
@settings(max_examples=150)
def test_only_a_better_exchange_takes_the_place_of_another_change(scene: Scene) -> None:
    """A change of the same gain per move stays; one slightly worse goes."""
    for search in (copy, drop):
        first = search(scene, scene.nothing())
        if first.slot >= 0 and first.gain_per_move >= VISIBLE:
            known = Change(first.gain_per_move, 1.0, 1, 0, -1, 0)
            assert search(scene, known) == known
            worse = known._replace(gain_per_move=first.gain_per_move * (1.0 - 1e-6))
            better = search(scene, worse)
            assert better != worse
            assert better.gain_per_move == pytest.approx(first.gain_per_move, rel=1e-6)
