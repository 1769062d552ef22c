"""Stall clock: the device's time where there is a device, read late and without a wait."""

import time

import pytest
import torch
from step_path import DEVICE, recording_waits

from ep_rebalance.telemetry.stall_clock import StallClock


class Stream:
    """What a device has been given to do; `now` is how far it came, in ms. Makes events like
    `torch.Event`."""

    def __init__(self) -> None:
        self.given, self.now, self.events = 0.0, 0.0, 0

    def event(self) -> "Event":
        self.events += 1
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0.0

    def record(self) -> None:
        self.at = self.stream.given

    def query(self) -> bool:
        return self.stream.now >= self.at

    def elapsed_time(self, end_event: "Event") -> float:
        assert self.query()
        assert end_event.query(), "torch raises where an event has not been reached"
        return end_event.at - self.at


def test_on_cpu_the_work_itself_is_timed_and_told_at_once():
    seen: list[float] = []
    clock = StallClock(torch.device("cpu"), seen.append)
    before = time.perf_counter()
    with clock.stall():
        while time.perf_counter() == before:
            pass
    assert 0 < seen[0] <= time.perf_counter() - before
    clock.read()
    assert len(seen) == 1


def test_on_a_device_its_own_time_counts_not_that_of_the_launch():
    seen: list[float] = []
    stream = Stream()
    clock = StallClock(DEVICE, seen.append, stream.event)
    stream.given = 50.0  # the forward pass that runs
    for milliseconds in (3_000.0, 7_000.0):
        with clock.stall():
            stream.given += milliseconds
    clock.read()
    assert seen == []
    stream.now = 3_050.0
    clock.read()
    assert seen == [pytest.approx(3.0)]
    stream.now = stream.given
    clock.read()
    assert seen == [pytest.approx(3.0), pytest.approx(7.0)]


def test_a_device_that_waits_for_the_host_stalls_as_long_as_the_host_takes():
    seen: list[float] = []
    stream = Stream()
    clock = StallClock(DEVICE, seen.append, stream.event)
    before = time.perf_counter()
    with clock.stall():
        time.sleep(0.001)
    clock.read()
    assert 0.001 <= seen[0] <= time.perf_counter() - before


def test_events_are_used_again_and_work_that_raises_is_no_stall():
    seen: list[float] = []
    stream = Stream()
    clock = StallClock(DEVICE, seen.append, stream.event)
    for _ in range(5):
        with clock.stall():
            stream.given += 1.0
        stream.now = stream.given
        clock.read()
    assert stream.events == 2
    with pytest.raises(RuntimeError, match="peer"), clock.stall():
        raise RuntimeError("a peer is gone")
    clock.read()
    assert len(seen) == 5


def test_nothing_waits_for_the_device():
    with recording_waits() as waits:
        clock = StallClock(DEVICE, lambda seconds: None)
        for _ in range(3):
            with clock.stall():
                torch.ones(3, device=DEVICE)
            clock.read()
            waits.end_step()
    assert waits == []
