"""The checker of histories finds what is planted in one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from checker import violations
from history import Asked, Began, Ended, Event, Happened, History, Read

ANSWERS = [(1, 2), (3, 4)]
BOUND = 10.0

FAULT = Happened("worker killed", 0, 3.0, 5.0, refuses=True)
RIGHT = Asked(0, 1.0, 2.0, 0, (1, 2), 200)
FAILED = Asked(0, 2.5, 3.5, 1, None, 500)
FIRST = Read(0, 1.0, 1, {"committed": 1, "abandoned": 0}, 0, {"tokens": 5.0})
SECOND = Read(0, 2.0, 4, {"committed": 2, "abandoned": 1}, 1, {"tokens": 7.0})
HISTORY: tuple[Event, ...] = (
    Began(0, 0.0, 1), RIGHT, FIRST, SECOND, FAILED, FAULT, Ended(0, 4.0, 1, ()),
)  # fmt: skip


def test_a_right_history_has_nothing_wrong(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for event in HISTORY:
        history.tell(event)
    assert tuple(history) == HISTORY
    assert violations(history, ANSWERS, bound_seconds=BOUND) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (RIGHT, replace(RIGHT, answer=(1, 3)), "has another answer"),
        (RIGHT, replace(RIGHT, ended=12.0), "took 11.0 s"),
        (FAILED, replace(FAILED, began=6.0, ended=6.1), "no fault explains it"),
        (FAULT, replace(FAULT, refuses=False), "no fault explains it"),
        (SECOND, replace(SECOND, generation=0), "generation 1 became 0"),
        (SECOND, replace(SECOND, reloads=0), "grew by 3 in 2 migrations and reloads"),
        (SECOND, replace(SECOND, counters={"tokens": 4.0}), "tokens went from 5.0 to 4.0"),
        (SECOND, replace(SECOND, counters={"tokens": math.nan}), "tokens went from 5.0 to nan"),
        (HISTORY[0], Began(0, 0.0, 3), "began at generation 1, 3 was saved"),
        (HISTORY[-1], Ended(0, 4.0, 1, ("Worker_DP1",)), "left Worker_DP1 behind"),
    ],
)
def test_what_is_wrong_is_named(right: Event, wrong: Event, said: str) -> None:
    history = [wrong if event == right else event for event in HISTORY]
    (found,) = violations(history, ANSWERS, bound_seconds=BOUND)
    assert said in found
