"""Step times: sums for a snapshot, single steps for a benchmark."""

import pytest

from ep_rebalance.load.step_times import STEPS_KEPT, StepSum, StepTime, StepTimes


def run(times: StepTimes, started, ended, *, continues=True, migrated=False) -> None:
    times.begin()
    times.end(started, ended, continues=continues, migrated=migrated)


def test_a_step_that_continues_took_the_interval_since_the_one_before():
    """However early its launches were done on the host."""
    times = StepTimes()
    run(times, 1.0, 1.01, continues=False)
    run(times, 1.02, 1.05)
    run(times, 1.06, 1.08)
    assert times.take_sum() == StepSum(
        steps=3,
        continued=2,
        continued_seconds=pytest.approx(1.08 - 1.01),
        alone=1,
        alone_seconds=pytest.approx(0.01),
    )
    assert times.take_sum() == StepSum()


def test_a_pause_of_the_engine_is_no_step_time():
    """The first step of new requests waited for them, whatever else the engine was doing."""
    times = StepTimes()
    run(times, 1.0, 1.25, continues=False)
    run(times, 60.0, 60.5, continues=False)
    assert [step.seconds for step in times.take_recent()] == [0.25, 0.5]
    assert times.take_sum().continued == 0


@pytest.mark.parametrize("idle_steps", [1, 3])
def test_dummy_and_warm_up_steps_are_counted_and_not_timed(idle_steps):
    """Nor is the step after them, since the time before it was not all this rank's work."""
    times = StepTimes()
    for step in range(idle_steps):
        run(times, None, 1.0 + step)
    run(times, 8.0, 8.25)
    run(times, None, 9.0)
    run(times, 9.5, 9.75)
    run(times, 9.8, 10.25)
    total = times.take_sum()
    assert total.steps == idle_steps + 4
    assert (total.alone, total.alone_seconds) == (2, 0.5)
    assert (total.continued, total.continued_seconds) == (1, 0.5)


def test_intervals_go_on_over_a_snapshot():
    times = StepTimes()
    run(times, 1.0, 1.25, continues=False)
    times.take_sum()
    run(times, 1.5, 2.25)
    assert times.take_sum() == StepSum(steps=1, continued=1, continued_seconds=1.0)


def test_each_busy_step_is_handed_out_once_and_in_order():
    times = StepTimes()
    run(times, 1.0, 1.25, continues=False, migrated=True)
    run(times, 2.0, 2.5)
    assert times.take_recent() == [StepTime(1.0, 1.25, True), StepTime(1.25, 2.5, False)]
    times.take_sum()
    assert times.take_recent() == []


def test_steps_that_nobody_asks_for_do_not_pile_up():
    times = StepTimes()
    for _ in range(STEPS_KEPT + 1):
        run(times, 0.0, 0.0)
    assert len(times.take_recent()) == STEPS_KEPT


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -5.0, 1e9])
def test_a_time_that_cannot_be_is_none_nor_is_it_that_of_the_step_after(bad):
    times = StepTimes()
    run(times, 1.0, 1.25, continues=False)
    run(times, bad, bad)
    run(times, 2.0, 2.5)
    run(times, 2.6, 3.0)
    assert times.take_sum() == StepSum(
        steps=4, continued=1, continued_seconds=0.5, alone=2, alone_seconds=0.75, untimed=1
    )
