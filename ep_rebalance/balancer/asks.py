"""Asks: what the loop wants done. Whoever drives the loop does it and sends the answer back.

`Rebalancer` answers with collectives and engine steps, a replay from a trace (`offline/balancing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ep_rebalance.load.snapshot import Snapshot
from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.batches import Migration
from ep_rebalance.telemetry.events import Event

Answer = TypeVar("Answer")


class Ask(Generic[Answer]):
    """A request that is answered with an `Answer`."""


Asks = Generator[Ask[Any], Any, Answer]
"""A generator that yields requests and returns an `Answer`."""


@dataclass(frozen=True, slots=True)
class NextSnapshot(Ask[Snapshot]):
    """Let the engine run until all ranks have the next snapshot."""


@dataclass(frozen=True, slots=True)
class FitQuotas(Ask[None]):
    """Begin to fit quotas for what is served; a snapshot tells when every rank has them.

    samples: the window, oldest first.
    """

    samples: tuple[LoadSample, ...]


@dataclass(frozen=True, slots=True)
class TakeUpQuotas(Ask[None]):
    """Serve the quotas that were fitted."""


@dataclass(frozen=True, slots=True)
class ServeLoaded(Ask[None]):
    """Serve these layers as the engine loaded them."""

    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose(Ask[None]):
    """Begin to plan on rank 0; a snapshot tells when the plan is done.

    samples: the window, oldest first.
    unseen: how many of them came after the previous plan began.
    step_seconds: seconds. Mean time of an engine step; 0 if unknown.
    """

    samples: tuple[LoadSample, ...]
    unseen: int
    step_seconds: float


@dataclass(frozen=True, slots=True)
class WorkOutRounds(Ask[None]):
    """Send all ranks the plan, and let each work out its rounds; a snapshot tells when all are done."""


@dataclass(frozen=True, slots=True)
class TakeRounds(Ask[Migration]):
    """Hand over the migration that was worked out."""


@dataclass(frozen=True, slots=True)
class Migrate(Ask[None]):
    """Carry the migration out, batch by batch, until the last one is served or a fault ends it.

    Quotas that are being fitted are dropped: they are for the placement before it.
    """


@dataclass(frozen=True, slots=True)
class Tell(Ask[None]):
    """Note what happened."""

    event: Event


def ask(request: Ask[Answer]) -> Asks[Answer]:
    """The answer to one request, with its type, which a bare `yield` would lose."""
    answer: Answer = yield request
    return answer


def drive(
    asks: Asks[None], answer: Callable[[Ask[Any]], Generator[None, None, Any]]
) -> Generator[None, None, None]:
    """Send each ask its answer, for which `answer` may let steps pass, one with each `yield`."""
    given: Any = None
    while True:
        given = yield from answer(asks.send(given))
