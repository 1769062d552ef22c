"""Numbers, links and layers in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ep_rebalance.offline.run import Replayed

LINK_TITLES: Mapping[str, str] = MappingProxyType(
    {"local": "within a rank", "intranode": "within a node", "internode": "between nodes"}
)


def percent(part: float, digits: int = 1) -> str:
    """A fraction as a percentage. What rounds to 0 has no sign."""
    return f"{round(100 * part, digits) + 0.0:.{digits}f}\N{NO-BREAK SPACE}%"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}\N{NO-BREAK SPACE}ms"


def duration(seconds: float) -> str:
    """Three digits, in milliseconds below a second."""
    number, unit = (1e3 * seconds, "ms") if seconds < 1.0 else (seconds, "s")
    return f"{number:.3g}\N{NO-BREAK SPACE}{unit}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def waiting_step(recorded_ranks: int, recorded: str) -> str:
    """Of which step `MeasuredSteps` takes a fraction to wait for experts.

    recorded: what a recorded step is called.
    """
    return recorded if recorded_ranks > 1 else "a step with even load"


def migrations_of(one: Replayed) -> str:
    return counted(len(one.commits), "migration")


def ranges_of(numbers: Iterable[int]) -> str:
    """Numbers as ranges: `0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
