"""Reads a history, and says what in it should not be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from history import Asked, Began, Ended, Event, Happened, Read


def violations(
    events: Iterable[Event], answers: Sequence[Sequence[int]], *, bound_seconds: float
) -> list[str]:
    """One sentence for each.

    answers: for each question, of one rank without the plugin.
    bound_seconds: no request takes longer, whatever happens.
    """
    told = list(events)
    faults = [event for event in told if isinstance(event, Happened)]
    return [
        *_requests(told, faults, answers, bound_seconds),
        *_readings(told),
        *_ends(told),
    ]


def _requests(
    told: Sequence[Event],
    faults: Sequence[Happened],
    answers: Sequence[Sequence[int]],
    bound: float,
) -> Iterator[str]:
    for asked in told:
        if not isinstance(asked, Asked):
            continue
        what = f"question {asked.question}, asked at {asked.began:.1f}"
        if asked.answer is not None and list(asked.answer) != list(answers[asked.question]):
            yield f"{what}, has another answer than one rank gives"
        if asked.ended - asked.began > bound:
            yield f"{what}, took {asked.ended - asked.began:.1f} s"
        if asked.status != 200 and not any(_covers(fault, asked) for fault in faults):
            yield f"{what}, was answered with {asked.status}, and no fault explains it"


def _covers(fault: Happened, asked: Asked) -> bool:
    return fault.refuses and asked.began <= fault.ended and asked.ended >= fault.began


def _readings(told: Sequence[Event]) -> Iterator[str]:
    """Within a life neither generation nor counters go back, and a life begins where its state file ends."""
    for life in sorted({event.life for event in told if isinstance(event, Read)}):
        readings = [event for event in told if isinstance(event, Read) and event.life == life]
        saved = [e.saved_generation for e in told if isinstance(e, Began) and e.life == life]
        if saved and readings[0].generation < saved[0]:
            yield f"life {life} began at generation {readings[0].generation}, {saved[0]} was saved"
        for before, after in pairwise(readings):
            yield from _falls(life, before, after)
        for reading in readings:
            yield from _unexplained(life, readings[0], reading)


def _falls(life: int, before: Read, after: Read) -> Iterator[str]:
    when = f"life {life}, at {after.at:.1f}"
    if after.generation < before.generation:
        yield f"{when}: generation {before.generation} became {after.generation}"
    for name in sorted(before.counters.keys() & after.counters.keys()):
        if not after.counters[name] >= before.counters[name]:  # also if it is not a number
            yield f"{when}: {name} went from {before.counters[name]} to {after.counters[name]}"


def _unexplained(life: int, first: Read, later: Read) -> Iterator[str]:
    """A reload is counted at once, and makes a generation when all ranks know of it."""
    grown, ended = later.generation - first.generation, _changes(later) - _changes(first)
    if grown > ended:
        yield (
            f"life {life}, at {later.at:.1f}: the generation grew by {grown} in {ended} migrations and "
            "reloads"
        )


def _changes(read: Read) -> int:
    """Migrations, also such as were given up when some of their experts had moved, and reloads."""
    return read.plans["committed"] + read.plans["abandoned"] + read.reloads


def _ends(told: Sequence[Event]) -> Iterator[str]:
    for event in told:
        if isinstance(event, Ended) and event.left:
            yield f"life {event.life} left {', '.join(event.left)} behind"
