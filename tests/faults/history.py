"""What was seen of a server while faults happened to it: requests, readings, lives. Appended to a file, one
JSON line each, so that the history outlives whatever dies.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for an answer.

    began, ended: seconds of `time.monotonic`.
    question: its number.
    answer: token ids; None if there is none.
    status: of HTTP; 0 if the connection broke, the client gave up, or the server broke the answer off.
    """

    kind: ClassVar[str] = "asked"

    life: int
    began: float
    ended: float
    question: int
    answer: tuple[int, ...] | None
    status: int


@dataclass(frozen=True, slots=True)
class Read:
    """What the status said.

    plans: by their outcome. reloads: of weights.
    counters: all of our series that only grow, by name and labels.
    """

    kind: ClassVar[str] = "read"

    life: int
    at: float
    generation: int
    plans: dict[str, int]
    reloads: int
    counters: dict[str, float]


@dataclass(frozen=True, slots=True)
class Began:
    """A server answers. saved_generation: of the state file that it was started with; -1 without one."""

    kind: ClassVar[str] = "began"

    life: int
    at: float
    saved_generation: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A server is gone. left: its processes that were not, some seconds after its first one."""

    kind: ClassVar[str] = "ended"

    life: int
    at: float
    code: int
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault, from its beginning until it is over. refuses: whether requests may fail meanwhile."""

    kind: ClassVar[str] = "happened"

    fault: str
    life: int
    began: float
    ended: float
    refuses: bool


Event = Asked | Read | Began | Ended | Happened
_KINDS = {event.kind: event for event in (Asked, Read, Began, Ended, Happened)}


@dataclass
class History:
    """Events in the order in which they were told, from any thread."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, event: Event) -> None:
        line = json.dumps({"kind": event.kind, **asdict(event)})
        with self._lock, self.path.open("a") as file:
            file.write(f"{line}\n")

    def __iter__(self) -> Iterator[Event]:
        with self.path.open() as file:
            for line in file:
                yield _event(json.loads(line))


def now() -> float:
    return time.monotonic()


def _event(told: dict[str, Any]) -> Event:
    kind = _KINDS[told.pop("kind")]
    lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
    return kind(**{**told, **lists})
