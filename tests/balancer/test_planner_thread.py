"""The thread of the background: what is handed to it, and what it gives back."""

import threading
import time

import pytest

from ep_rebalance.balancer.planner_thread import DaemonThread

TIMEOUT_SECONDS = 30


def test_jobs_run_in_turn_on_one_thread():
    """Starting a thread makes the step wait for it; out of turn, an old split could come last."""
    thread, order = DaemonThread(), []

    def job(number: int) -> int:
        time.sleep(0.01 * (5 - number))
        order.append(number)
        return threading.get_ident()

    jobs = [thread.submit(job, number) for number in range(5)]
    idents = {job.result(TIMEOUT_SECONDS) for job in jobs}
    assert order == [0, 1, 2, 3, 4]
    assert len(idents) == 1
    assert threading.get_ident() not in idents


def test_a_job_that_fails_leaves_the_thread_to_the_next():
    thread = DaemonThread()
    failing, next_one = thread.submit(int, "x"), thread.submit(int, "7")
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(TIMEOUT_SECONDS)
    assert next_one.result(TIMEOUT_SECONDS) == 7
