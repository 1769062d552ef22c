from __future__ import annotations

import math

import numpy as np
import pytest
from shapes import window_of

from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.track_record import Promise, TrackRecord

BEFORE = Placement(np.array([[0, 1, 2, 3]], dtype=np.int32), 4, 2)
AFTER = Placement(np.array([[0, 2, 1, 3]], dtype=np.int32), 4, 2)
PROMISE = Promise(
    before=BEFORE,
    before_quotas_LP=np.ones((1, 4)),
    after=AFTER,
    after_quotas_LP=np.ones((1, 4)),
    predicted=0.5,
)


def achieved(*tokens_WE: list[float]) -> float:
    return PROMISE.achieved(window_of(np.array(tokens_WE)[:, None]), TokenCost())


def test_nothing_known_is_full_trust() -> None:
    assert TrackRecord().trust == 1.0


def test_kept_and_surpassed_promises_keep_the_trust() -> None:
    record = TrackRecord().with_outcome(0.3, 0.3)
    assert record.trust == pytest.approx(1.0)
    assert record.with_outcome(0.1, 0.4).trust == 1.0


def test_broken_promises_lower_it_as_far_as_a_tenth() -> None:
    half = TrackRecord().with_outcome(0.3, 0.15)
    assert half.trust == pytest.approx(0.17 / 0.32)
    assert half.with_outcome(0.3, 0.0).trust < half.trust
    assert half.with_outcome(0.3, -5.0).trust == pytest.approx(0.1)


def test_a_great_loss_is_forgiven_as_soon_as_a_small_one() -> None:
    great = TrackRecord().with_outcome(0.3, -5.0)
    assert great == TrackRecord().with_outcome(0.3, -0.3)


def test_small_promises_say_little() -> None:
    assert TrackRecord().with_outcome(0.001, 0.0).trust > 0.95


def test_what_was_long_ago_is_forgiven() -> None:
    record = TrackRecord().with_outcome(0.3, 0.0)
    trusts = [record.trust]
    for _ in range(20):
        record = record.faded()
        trusts.append(record.trust)
    assert trusts == sorted(trusts)
    assert trusts[-1] > 0.95


def test_a_plan_achieves_what_the_busiest_rank_saves() -> None:
    assert achieved([3, 3, 1, 1]) == pytest.approx(1 - 1 / 1.5)
    assert achieved([3, 1, 3, 1]) == pytest.approx(1 - 1.5)
    assert achieved([3, 3, 1, 1], [1, 1, 1, 1]) == pytest.approx(1 - 2 / 2.5)


def test_load_of_nothing_achieves_nothing() -> None:
    assert achieved([0, 0, 0, 0]) == 0.0


def test_a_promise_that_step_times_belie_lowers_the_trust_as_if_it_had_kept_so_little() -> None:
    record = TrackRecord().with_outcome(0.3, 0.3)
    assert record.with_measured(0.0).trust == TrackRecord().with_outcome(0.3, 0.0).trust
    assert record.with_measured(0.5).trust == TrackRecord().with_outcome(0.3, 0.15).trust
    assert record.with_measured(-9.0).trust == TrackRecord().with_outcome(0.3, -9.0).trust
    assert record.with_measured(math.inf).trust == record.trust


def test_of_two_judges_the_one_who_gives_less_is_believed() -> None:
    record = TrackRecord().with_outcome(0.3, 0.1)
    assert record.with_measured(0.9).trust == record.trust


def test_step_times_may_tell_later_and_may_change_their_mind() -> None:
    record = TrackRecord().with_outcome(0.3, 0.3).faded().faded()
    belied = record.with_measured(0.1)
    assert belied.trust < record.trust
    assert belied.with_measured(math.inf) == record


def test_what_step_times_said_stays_with_its_promise() -> None:
    belied = TrackRecord().with_outcome(0.3, 0.3).with_measured(0.0)
    plain = TrackRecord().with_outcome(0.3, 0.0)
    assert belied.with_outcome(0.2, 0.2).trust == plain.with_outcome(0.2, 0.2).trust
    assert belied.faded().trust == plain.faded().trust


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_a_trust_that_is(bad: float) -> None:
    record = TrackRecord().with_outcome(0.3, 0.15)
    for spoilt in (
        record.with_outcome(0.3, bad),
        record.with_outcome(bad, 0.1),
        record.with_measured(bad),
    ):
        for later in (spoilt, spoilt.faded(), spoilt.with_outcome(0.2, 0.1)):
            assert 0.1 <= later.trust <= 1.0
