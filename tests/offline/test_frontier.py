"""Which replays are worth choosing from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.offline.report.frontier import Point, frontiers

FIGURES = st.tuples(
    st.sampled_from([4, 8]), st.integers(0, 6).map(lambda n: n / 6), st.integers(0, 6).map(float)
)


def point(ranks: int, balance: float, price: float) -> Point:
    size: Any = SimpleNamespace(ranks=ranks)
    one: Any = SimpleNamespace()
    return Point(size, one, balance, price)


def beats(one: Point, other: Point) -> bool:
    as_good = one.balance >= other.balance and one.price <= other.price
    better = one.balance > other.balance or one.price < other.price
    return one.size.ranks == other.size.ranks and as_good and better


@settings(max_examples=300)
@given(st.lists(FIGURES, max_size=12))
def test_those_that_no_other_one_beats_are_on_a_frontier(figures: list[tuple]) -> None:
    found = [point(*one) for one in figures]
    best = [one for line in frontiers(found) for one in line]
    unbeaten = [one for one in found if not any(beats(other, one) for other in found)]
    assert sorted(map(id, best)) == sorted(map(id, unbeaten))


@settings(max_examples=100)
@given(st.lists(FIGURES, min_size=1, max_size=12))
def test_a_frontier_is_of_one_number_of_ranks_and_begins_with_the_cheapest(
    figures: list[tuple],
) -> None:
    for line in frontiers([point(*one) for one in figures]):
        assert len({one.size.ranks for one in line}) == 1
        assert (np.diff([one.price for one in line]) >= 0).all()
        assert (np.diff([one.balance for one in line]) >= 0).all()
