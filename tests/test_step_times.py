"""Step times: sums for a snapshot, single steps for a benchmark."""

import pytest

from ep_rebalance.step_times import STEPS_KEPT, StepSum, StepTime, StepTimes


def test_a_sum_holds_all_steps_and_the_time_of_the_busy_ones():
    times = StepTimes()
    for moments in ((1.0, 1.25), None, (2.0, 2.5)):
        times.begin()
        if moments is not None:
            times.end(StepTime(*moments, migrated=False))
    assert times.take_sum() == StepSum(steps=3, busy_steps=2, busy_seconds=pytest.approx(0.75))
    assert times.take_sum() == StepSum()


def test_each_busy_step_is_handed_out_once_and_in_order():
    times = StepTimes()
    steps = [StepTime(1.0, 1.25, migrated=True), StepTime(2.0, 2.5, migrated=False)]
    for step in steps:
        times.end(step)
    assert times.take_recent() == steps
    times.take_sum()
    assert times.take_recent() == []


def test_steps_that_nobody_asks_for_do_not_pile_up():
    times = StepTimes()
    for _ in range(STEPS_KEPT + 1):
        times.end(StepTime(0.0, 0.0, migrated=False))
    assert len(times.take_recent()) == STEPS_KEPT
