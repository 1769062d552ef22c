"""Stall clock: how long serving waits for work that is done between two steps.

On an accelerator the host only launches the work, so the stall is the time between two events in its
stream, one before and one after the work. They are read in later steps, once the device has passed
them: reading them earlier would make the host wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from ep_rebalance.host_memory import pins


class TimingEvent(Protocol):
    """The part of a timing `torch.Event` that is used here."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: TimingEvent) -> float: ...


@dataclass(frozen=True, slots=True)
class _Interval:
    """Work on the device, between two events.

    host_seconds: how long the host took to launch it.
    """

    begin: TimingEvent
    end: TimingEvent
    host_seconds: float

    @property
    def stall_seconds(self) -> float:
        """The longer of the two times: an idle device waits for the host to launch the work."""
        return max(self.begin.elapsed_time(self.end) / 1e3, self.host_seconds)


class StallClock:
    """Times one kind of work on one device.

    observe: called with the seconds of each stall, in the order of the work. On CPU, where the host itself
        does the work, it is called immediately.
    event: makes a timing event; `torch.Event` by default.
    """

    def __init__(
        self,
        device: torch.device,
        observe: Callable[[float], None],
        event: Callable[[], TimingEvent] | None = None,
    ) -> None:
        self._observe = observe
        self._event = event or (lambda: torch.Event(device, enable_timing=True))
        self._on_device = pins(device)
        self._free: list[TimingEvent] = []
        self._pending: deque[_Interval] = deque()

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Times the work in its body. Work that raises is not counted."""
        begin = self._recorded()
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        end = self._recorded()
        if begin is None or end is None:
            self._observe(seconds)
        else:
            self._pending.append(_Interval(begin, end, seconds))

    def read(self) -> None:
        """Observe the stalls that the device has passed by now. Never waits."""
        while self._pending and self._pending[0].end.query():
            interval = self._pending.popleft()
            self._observe(interval.stall_seconds)
            self._free += (interval.begin, interval.end)

    def _recorded(self) -> TimingEvent | None:
        if not self._on_device:
            return None
        event = self._free.pop() if self._free else self._event()
        event.record()
        return event
