"""From the phases of a run to its numbers, and from the numbers to tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from serving_load import Measurement

BASE, IDEAL, IN_TURNS = "observe", "even", "turns"
BALANCERS = ("rebalance", "eplb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One server under load for a while.

    kind: `moving` from a fresh start on, `steady` after that.
    step_seconds: of rank 0's steps but those in which it was paused. carried: whether experts moved
    in it.
    imbalance: max/mean rank load over the phase, mean of the layers; None if the
    server cannot tell.
    """

    variant: str
    kind: str
    repetition: int
    round: int
    measurement: Measurement
    step_seconds: list[float]
    carried: list[bool]
    imbalance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What a balancer did between the start of its server and the end of a repetition.

    experts: slots that got another expert. bytes: of those that came from another rank.
    """

    variant: str
    repetition: int
    migrations: int
    experts: int
    bytes: int


@dataclass(slots=True)
class Results:
    """Everything that a run measured."""

    machine: dict[str, Any]
    options: dict[str, Any]
    phases: list[Phase] = field(default_factory=list)
    moves: list[Moves] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the summary."""
        return {**asdict(self), "summary": summarise(self)}


def summarise(results: Results) -> dict[str, Any]:
    """The numbers of the tables, by variant, and those that compare."""
    names = list(dict.fromkeys(phase.variant for phase in results.phases))
    steady = {name: _steady(results, name) for name in names}
    moving = {name: _moving(results, name) for name in names if name in BALANCERS}
    return {"steady": steady, "moving": moving, **_comparisons(results)}


def _steady(results: Results, name: str) -> dict[str, Any]:
    phases = [p for p in results.phases if p.variant == name and p.kind == "steady"]
    rates = [p.measurement.tokens_per_second for p in phases]
    ratios = paired_ratios(results, name, BASE)
    return {
        "phases": len(phases),
        "tokens_per_second": _spread(rates),
        "ratio_to_contiguous": _spread(ratios),
        "ttft_seconds": _tail(s for p in phases for s in p.measurement.ttft_seconds),
        "gap_seconds": _tail(s for p in phases for s in p.measurement.gap_seconds),
        "step_seconds": _tail(s for p in phases for s in p.step_seconds),
        "imbalance": _mean(p.imbalance for p in phases if p.imbalance is not None),
    }


def _moving(results: Results, name: str) -> dict[str, Any]:
    phases = [p for p in results.phases if p.variant == name and p.kind == "moving"]
    moves = [m for m in results.moves if m.variant == name]
    steps = [(s, c) for p in phases for s, c in zip(p.step_seconds, p.carried, strict=True)]
    carrying, others = _tail(s for s, c in steps if c), _tail(s for s, c in steps if not c)
    return {
        "migrations": sum(m.migrations for m in moves),
        "experts_moved": sum(m.experts for m in moves),
        "bytes_moved": sum(m.bytes for m in moves),
        "repetitions": len(moves),
        "carrying_steps": carrying,
        "other_steps": others,
        "p99_ratio": _ratio(carrying, others),
    }


def _comparisons(results: Results) -> dict[str, Any]:
    """How the servers compare; None where a server of a comparison was not measured."""
    compared: dict[str, Any] = {}
    ideal = paired_ratios(results, IDEAL, BASE)
    for name in BALANCERS:
        ratios = paired_ratios(results, name, BASE)
        gain = float(np.median(ideal)) - 1.0 if ideal else 0.0
        compared[f"{name}_share_of_ideal_gain"] = (
            (float(np.median(ratios)) - 1.0) / gain if ratios and gain > 0 else None
        )
    compared["counting"] = _counting(results)
    compared["rebalance_to_eplb"] = _spread(paired_ratios(results, "rebalance", "eplb"))
    return compared


def paired_ratios(results: Results, name: str, base: str) -> list[float]:
    """Throughput of `name` to that of `base` in the same round: slow spells of the machine cancel."""
    rates = {
        (p.variant, p.repetition, p.round): p.measurement.tokens_per_second
        for p in results.phases
        if p.kind == "steady"
    }
    return [
        rate / rates[base, repetition, number]
        for (variant, repetition, number), rate in rates.items()
        if variant == name and (base, repetition, number) in rates
    ]


def _counting(results: Results) -> dict[str, float] | None:
    """What counting adds to the time of a full step, and the standard error of that.

    Steps that follow each other, one with and one without, have about as many tokens.
    """
    pairs = [
        pair
        for phase in results.phases
        if phase.variant == IN_TURNS
        for pair in _neighbours(np.array(phase.step_seconds), np.array(phase.carried))
    ]
    if not pairs:
        return None
    counted_N, uncounted_N = np.array(pairs).T
    difference_N = counted_N - uncounted_N
    return {
        "pairs": len(pairs),
        "overhead": float(difference_N.mean() / uncounted_N.mean()),
        "error": float(difference_N.std() / len(pairs) ** 0.5 / uncounted_N.mean()),
    }


def _neighbours(
    seconds_N: NDArray[np.float64], uncounted_N: NDArray[np.bool_]
) -> Iterator[tuple[float, float]]:
    """(with counting, without) of full steps that follow each other, each step in one pair only."""
    full_N = seconds_N > 0.5 * np.quantile(seconds_N, 0.9)
    at = 0
    while at + 1 < seconds_N.size:
        one, other = at, at + 1
        if full_N[one] and full_N[other] and uncounted_N[one] != uncounted_N[other]:
            counted, uncounted = (other, one) if uncounted_N[one] else (one, other)
            yield float(seconds_N[counted]), float(seconds_N[uncounted])
            at += 2
        else:
            at += 1


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "median": float(np.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
    }


def _tail(values: Iterable[float]) -> dict[str, float] | None:
    listed = list(values)
    if not listed:
        return None
    return {
        "count": len(listed),
        "p50": float(np.quantile(listed, 0.5)),
        "p99": float(np.quantile(listed, 0.99)),
        "max": max(listed),
    }


def _ratio(one: dict[str, float] | None, other: dict[str, float] | None) -> float | None:
    return one["p99"] / other["p99"] if one and other else None


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return float(np.mean(listed)) if listed else None


def show(results: Results, titles: dict[str, str], console: Console) -> None:
    """Print the table and the lines below it."""
    summary = summarise(results)
    console.print(_table(summary, titles))
    for line in _lines(summary, titles):
        console.print(line, highlight=False)
    machine = results.machine
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), style="dim")


_STEADY_ROWS = (
    ("tokens/s, median", "tokens_per_second.median", 1.0, "{:.0f}"),
    ("  least", "tokens_per_second.min", 1.0, "{:.0f}"),
    ("  most", "tokens_per_second.max", 1.0, "{:.0f}"),
    ("to contiguous, median", "ratio_to_contiguous.median", 1.0, "{:.3f}"),
    ("  least", "ratio_to_contiguous.min", 1.0, "{:.3f}"),
    ("  most", "ratio_to_contiguous.max", 1.0, "{:.3f}"),
    ("first token p50, ms", "ttft_seconds.p50", 1e3, "{:.0f}"),
    ("first token p99, ms", "ttft_seconds.p99", 1e3, "{:.0f}"),
    ("between tokens p50, ms", "gap_seconds.p50", 1e3, "{:.0f}"),
    ("between tokens p99, ms", "gap_seconds.p99", 1e3, "{:.0f}"),
    ("step p50, ms", "step_seconds.p50", 1e3, "{:.0f}"),
    ("step p99, ms", "step_seconds.p99", 1e3, "{:.0f}"),
    ("imbalance (max/mean)", "imbalance", 1.0, "{:.2f}"),
)
_MOVING_ROWS = (
    ("migrations", "migrations", 1, "{}"),
    ("experts moved", "experts_moved", 1, "{}"),
    ("MB moved", "bytes_moved", 1e-6, "{:.0f}"),
    ("steps moving experts", "carrying_steps.count", 1, "{}"),
    ("  p99, ms", "carrying_steps.p99", 1e3, "{:.0f}"),
    ("  max, ms", "carrying_steps.max", 1e3, "{:.0f}"),
    ("other steps", "other_steps.count", 1, "{}"),
    ("  p99, ms", "other_steps.p99", 1e3, "{:.0f}"),
    ("  max, ms", "other_steps.max", 1e3, "{:.0f}"),
    ("p99 of one to the other", "p99_ratio", 1.0, "{:.2f}"),
)


def _table(summary: dict[str, Any], titles: dict[str, str]) -> Table:
    names = [name for name in titles if name in summary["steady"]]
    table = Table()
    table.add_column()
    for name in names:
        table.add_column(titles[name], justify="right")
    sections = (("steady", "steady load", _STEADY_ROWS), ("moving", "after a start", _MOVING_ROWS))
    for section, heading, rows in sections:
        if not summary[section]:
            continue
        table.add_section()
        table.add_row(f"[bold]{heading}[/]")
        for label, path, scale, pattern in rows:
            cells = (_cell(summary[section].get(name), path, scale, pattern) for name in names)
            table.add_row(label, *cells)
    return table


def _cell(row: dict[str, Any] | None, path: str, scale: float, pattern: str) -> str:
    """The value at a dotted path; "-" where nothing was measured."""
    value: Any = row
    for key in path.split("."):
        if value is None:
            return "-"
        value = value[key]
    return "-" if value is None else pattern.format(value * scale)


def _lines(summary: dict[str, Any], titles: dict[str, str]) -> list[str]:
    lines = [
        f"{titles[name]} gains {share:.0%} of what an even router gains."
        for name in BALANCERS
        if (share := summary[f"{name}_share_of_ideal_gain"]) is not None
    ]
    if (ratio := summary["rebalance_to_eplb"]) is not None:
        lines.append(
            f"{titles['rebalance']} serves {ratio['median']:.3f} times the tokens of "
            f"{titles['eplb']} ({ratio['min']:.3f} to {ratio['max']:.3f})."
        )
    if (counting := summary["counting"]) is not None:
        lines.append(
            f"Counting adds {counting['overhead']:.2%} to a full step (standard error "
            f"{counting['error']:.2%}, {counting['pairs']} pairs of steps)."
        )
    return lines
