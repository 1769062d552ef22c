"""Tables of results: for the terminal, and in Markdown for the documentation."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_kit.driver import Result

UNKNOWN_MACHINE = "a machine that was not described"


def read_log(path: Path) -> list[Result]:
    """The last result of each step, in the order in which steps were first taken.

    A step that was taken does not count as skipped because a later run had no time for it. Raises
    ValueError for a line that is no result.
    """
    results: dict[str, Result] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            result = Result(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if result.ok is not None or result.step not in results:
            results[result.step] = result
    return list(results.values())


def markdown(results: Iterable[Result]) -> str:
    """A heading with the machine's name and a table."""
    results = list(results)
    rows = [
        f"| {r.step} | {outcome(r)} | {r.seconds:.1f} | {_cell(r)} |"
        for r in results
        if r.step != "machine"
    ]
    lines = [
        f"On {machine_name(results)}:",
        "",
        "| step | result | seconds | figures |",
        "|---|---|---:|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def summary(results: Iterable[Result]) -> str:
    """One line per step, and how many went how."""
    results = list(results)
    width = max((len(r.step) for r in results), default=0)
    lines = [
        f"{r.step:{width}}  {outcome(r):8}  {r.seconds:6.1f} s  {r.reason}".rstrip()
        for r in results
    ]
    counts = {
        name: sum(outcome(r) == name for r in results) for name in ("ok", "FAILED", "skipped")
    }
    lines.append(", ".join(f"{count} {name}" for name, count in counts.items()))
    return "\n".join(lines)


def outcome(result: Result) -> str:
    return {True: "ok", False: "FAILED", None: "skipped"}[result.ok]


def machine_name(results: Iterable[Result]) -> str:
    """As the step `machine` found it."""
    for result in results:
        if result.step == "machine" and result.figures:
            return _listed(result.figures)
    return UNKNOWN_MACHINE


def _cell(result: Result) -> str:
    parts = [part for part in (result.reason, _listed(result.figures)) if part]
    return "; ".join(parts).replace("|", "\\|").replace("\n", " ")


def _listed(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in figures.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_listed(value)})"
    if isinstance(value, list):
        return " ".join(_value(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
