"""Step times: sums for a snapshot, single steps for a benchmark."""

import pytest

from ep_rebalance.step_times import STEPS_KEPT, StepSum, StepTime, StepTimes


def test_a_sum_holds_all_steps_and_the_time_of_the_busy_ones():
    times = StepTimes()
    for seconds in (0.25, None, 0.5):
        times.begin()
        if seconds is not None:
            times.end(seconds, migrated=False)
    assert times.take_sum() == StepSum(steps=3, busy_steps=2, busy_seconds=pytest.approx(0.75))
    assert times.take_sum() == StepSum()


def test_each_busy_step_is_handed_out_once_and_in_order():
    times = StepTimes()
    times.end(0.25, migrated=True)
    times.end(0.5, migrated=False)
    assert times.take_recent() == [StepTime(0.25, True), StepTime(0.5, False)]
    times.take_sum()
    assert times.take_recent() == []


def test_steps_that_nobody_asks_for_do_not_pile_up():
    times = StepTimes()
    for _ in range(STEPS_KEPT + 1):
        times.end(0.0, migrated=False)
    assert len(times.take_recent()) == STEPS_KEPT
