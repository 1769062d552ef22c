"""The descent on one layer, followed change by change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import ROUNDING, SmallLayer, assert_same_score, changed, small_layers

from ep_rebalance.planning.incremental.descent import _TRIED_IN_VAIN, improve_layer
from ep_rebalance.planning.incremental.layer import Change, LayerState, apply_change, start_layer


@st.composite
def descents(draw: st.DrawFn) -> tuple[SmallLayer, int, int, float]:
    """A layer, the most slots it may move and that may arrive on a rank, and the least gain."""
    small, least = draw(small_layers()), draw(st.sampled_from([1e-6, 0.02, 0.2]))
    return small, draw(st.integers(0, 6) | st.just(99)), draw(st.integers(1, 3)), least


def made(small: SmallLayer, max_moved: int, max_arrivals: int, least: float) -> list[Change]:
    changes_N4, gains_N2 = improve_layer(
        small.inputs(), small.origin_P.astype(np.int32), max_moved, max_arrivals, least
    )
    return [
        Change(per_move, gain, moved, *place)
        for (moved, *place), (gain, per_move) in zip(
            changes_N4.tolist(), gains_N2.tolist(), strict=True
        )
    ]


@given(descents())
@settings(max_examples=200)
def test_every_change_gains_what_it_says_within_the_budgets(
    descent: tuple[SmallLayer, int, int, float],
) -> None:
    small, max_moved, max_arrivals, least = descent
    slots_P = small.origin_P
    for change in made(*descent):
        places = iter([change[3:]])
        (counted,) = small.scored(slots_P, places, max_moved, max_arrivals)
        assert_same_score(change, counted)
        assert change.gain_per_move > least
        slots_P = changed(slots_P, *change[3:])
        arrivals = [len(arrived) for arrived in small.arrivals(slots_P)]
        assert sum(arrivals) <= max_moved
        assert max(arrivals) <= max_arrivals
    before = small.objective(small.held(small.origin_P))
    assert small.objective(small.held(slots_P)) <= before + ROUNDING


@given(descents())
@settings(max_examples=150)
def test_the_costliest_rank_that_can_be_relieved_gets_its_best_change(
    descent: tuple[SmallLayer, int, int, float],
) -> None:
    """And where the descent ends, no rank whose turn it is has one that is worth a move."""
    small, max_moved, max_arrivals, least = descent
    experts = small.inputs()
    layer = start_layer(experts, small.origin_P.astype(np.int32))
    for change in [*made(*descent), None]:
        left = max_moved - int(layer.arrivals_R.sum())
        if left <= 0:
            assert change is None
            return
        for rank in ranks_to_try(layer, least):
            certain, possible = (
                changes_of(small, layer, rank, left, max_arrivals, slack)
                for slack in (-ROUNDING, ROUNDING)
            )
            found = change if change and change[3:] in {c[3:] for c in possible} else None
            highest = max((c.gain_per_move for c in certain), default=-np.inf)
            if found:
                assert found.gain_per_move >= highest - ROUNDING
                break
            assert highest <= least + ROUNDING
            layer.failed_square_R[rank] = layer.square_R[rank]
        else:
            assert change is None
            return
        apply_change(experts, layer, change)


def ranks_to_try(layer: LayerState, least: float) -> list[int]:
    """The costliest few above the average that were not tried in vain, or grew since."""
    due = layer.square_R > layer.failed_square_R + least
    due_R = [r for r in np.argsort(-layer.square_R, kind="stable").tolist() if due[r]]
    above = [r for r in due_R if layer.square_R[r] >= layer.square_R.mean()]
    return above[:_TRIED_IN_VAIN]


def changes_of(
    small: SmallLayer, layer: LayerState, rank: int, left: int, max_arrivals: int, slack: float
) -> list[Change]:
    slots_P, square_R = layer.slots_P, layer.square_R
    others = np.flatnonzero(square_R <= square_R.mean() + slack).tolist()
    found: list[Change] = []
    for changes in (
        small.swaps(slots_P, rank, others),
        small.copies(slots_P, rank),
        small.drops(slots_P, rank),
    ):
        found += small.scored(slots_P, changes, left, max_arrivals)
    return found


def two_on_each_rank(*loads: float) -> SmallLayer:
    """One replica of each expert, in order, on one node; a single sample."""
    return SmallLayer(
        sample_WE=np.array([loads]),
        alone_E=np.zeros(len(loads)),
        part_EC=np.tile([0.0, 1.0, 0.5], (len(loads), 1)),
        origin_P=np.arange(len(loads)),
        node_R=np.zeros(len(loads) // 2, np.int64),
        internode_price=1.0,
        token_price=0.0,
    )


def test_a_swap_needs_a_budget_of_two_slots() -> None:
    small = two_on_each_rank(3, 3, 1, 1)
    assert [len(made(small, budget, 2, 1e-6)) for budget in (0, 1, 2, 3)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("in_vain", "swaps"), [(2, 1), (3, 0)])
def test_a_layer_is_left_after_three_ranks_that_were_tried_in_vain(
    in_vain: int, swaps: int
) -> None:
    """Nothing relieves a rank whose load is that of one expert; the next one could be."""
    small = two_on_each_rank(*[10, 0] * in_vain, 5, 4, 1, 1)
    assert len(made(small, 2, 2, 1e-6)) == swaps
