"""Two results of earlier replays, side by side: `ep-rebalance replay --compare A.json B.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from rich.filesize import decimal

from ep_rebalance.commands.output import Shown
from ep_rebalance.commands.replay_result import SCHEMA_VERSION
from ep_rebalance.foreign_json import decoded
from ep_rebalance.offline.report.next_step import flat
from ep_rebalance.regular_files import read_regular
from ep_rebalance.version import __version__

_MAX_BYTES = 1 << 28

_Key = tuple[str, int, int]
"""Policy, EP size, redundant experts."""

_UNKNOWN = "not told"
"""For what an earlier version did not write."""


_Figure = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    policy: str
    ep_size: _Count
    redundant_experts: _Count
    imbalance: _Figure
    balancedness: _Figure
    step_seconds: _Figure
    step_time_saved: _Figure | None
    step_time_saved_error: _Figure | None = None
    plans: dict[str, _Count]
    experts_moved: _Count
    bytes_moved: _Count | None
    stall_seconds: _Figure | None = 0.0
    eplb: dict[str, Any] = {}

    @property
    def key(self) -> _Key:
        return self.policy, self.ep_size, self.redundant_experts


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a result that are compared, see `as_json`."""

    plugin_version: str
    trace: dict[str, Any]
    config: dict[str, Any]
    expert_time: dict[str, Any]
    rows: list[_Row]
    hardware: Any = _UNKNOWN
    ranks_per_node: int | str | None = _UNKNOWN

    def circumstances(self) -> dict[str, Any]:
        """What it was made of, by dotted key."""
        eplb: dict[str, Any] = next((row.eplb for row in self.rows if row.eplb), {})
        parts = {
            "trace": self.trace,
            "config": self.config,
            "expert_time": self.expert_time,
            "eplb": eplb,
            "hardware": self.hardware,
            "ranks_per_node": self.ranks_per_node,
            "plugin_version": self.plugin_version,
        }
        return flat(parts)


@dataclass(frozen=True, slots=True)
class Earlier:
    """A result in a file.

    circumstances: what it was made of, by dotted key.
    """

    path: Path
    rows: Sequence[_Row]
    circumstances: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Measure:
    """A figure that is compared.

    title: of its column; "" if it has none.
    digits: of the format with which a value, and a difference with its sign, is shown.
    """

    title: str
    digits: str
    scale: float = 1.0


_MEASURES: Mapping[str, _Measure] = MappingProxyType(
    {
        "imbalance": _Measure("max", ".3f"),
        "balancedness": _Measure("balance", ".3f"),
        "step_seconds": _Measure("step ms", ".2f", 1e3),
        "step_time_saved": _Measure("saved", ".1%"),
        "plans_committed": _Measure("commits", "d"),
        "plans_made": _Measure("", "d"),
        "experts_moved": _Measure("experts", "d"),
        "bytes_moved": _Measure("bytes", ""),
        "stall_seconds": _Measure("", ""),
    }
)


def read_result(path: Path) -> Earlier:
    """A result that `ep-rebalance replay --format json` wrote.

    Raises ValueError for everything else and for another schema version, OSError if it cannot be read.
    """
    content = read_regular(path, _MAX_BYTES)
    no_result = f"{path} is not a result of `ep-rebalance replay --format json`"
    try:
        found = decoded(content, object)
    except ValueError as error:
        raise ValueError(f"{no_result}: {error}") from None
    if not isinstance(found, dict) or not {"schema_version", "trace", "rows"} <= found.keys():
        raise ValueError(no_result)
    version = found["schema_version"]
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version!r}, and this is ep-rebalance {__version__}, which reads "
            f"{SCHEMA_VERSION}: replay the trace again"
        )
    try:
        result = msgspec.convert(found, _Result)
        return Earlier(path, result.rows, result.circumstances())
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{no_result}: {error}") from None


def compare(first: Earlier, second: Earlier) -> Shown:
    """Both results, with what differs between traces and settings ahead of the figures.

    Raises ValueError if no row of one has a partner in the other.
    """
    rows = [{one.key: one for one in earlier.rows} for earlier in (first, second)]
    keys = [key for key in rows[0] if key in rows[1]]
    alone = [[_name(key) for key in mine if key not in keys] for mine in rows]
    if not keys:
        raise ValueError(
            "no row of one result has the policy, EP size and redundant experts of one in the other: "
            f"{first.path} has {', '.join(alone[0]) or 'no rows'}; {second.path} has "
            f"{', '.join(alone[1]) or 'no rows'}"
        )
    differing = _differing(first.circumstances, second.circumstances)
    pairs = [(rows[0][key], rows[1][key]) for key in keys]
    compared = [_compared(*pair) for pair in pairs]
    result = {
        "schema_version": SCHEMA_VERSION,
        "plugin_version": __version__,
        "compared": [str(first.path), str(second.path)],
        "differing": differing,
        "only_in_first": alone[0],
        "only_in_second": alone[1],
        "rows": compared,
    }
    return Shown(
        result=result,
        title="Comparison",
        sentences=[
            *_circumstances(differing),
            *(
                f"Only {name} has: {', '.join(names)}."
                for name, names in zip("AB", alone, strict=True)
                if names
            ),
            *(sentence for pair in pairs if (sentence := _difference(*pair))),
        ],
        titles=["policy", "EP", "", *(one.title for one in _MEASURES.values() if one.title)],
        texts=("policy", ""),
        cells=[line for row in compared for line in _cells(row)],
        groups=3,
        caption=f"A: {first.path}. B: {second.path}. EP: ranks+redundant experts. max: load of the busiest "
        "rank over the mean; balance: its inverse, mean over layers. saved: of the step time, against "
        "policy none of the same result; its differences are in percentage points.",
        lines=[_line(row) for row in compared],
    )


def _name(key: _Key) -> str:
    policy, ranks, redundant = key
    return f"{policy} EP{ranks}+{redundant}"


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    keys = dict.fromkeys([*first, *second])
    values = {key: (first.get(key, _UNKNOWN), second.get(key, _UNKNOWN)) for key in keys}
    return [
        {"key": key, "first": one, "second": other}
        for key, (one, other) in values.items()
        if one != other
    ]


def _circumstances(differing: Sequence[dict[str, Any]]) -> list[str]:
    if not differing:
        return ["Same trace, same settings."]
    told = (f"- {one['key']}: {one['first']} in A, {one['second']} in B" for one in differing)
    moved = "trace.files"  # the same files may lie elsewhere
    traces = any(
        one["key"].startswith("trace.")
        and one["key"] != moved
        and _UNKNOWN not in (one["first"], one["second"])
        for one in differing
    )
    return [f"Different {'traces' if traces else 'settings'}:", *told]


def _difference(first: _Row, second: _Row) -> str:
    """What became of the gain; "" if a result does not tell it, or if it is of the baseline."""
    one, other = first.step_time_saved, second.step_time_saved
    if one is None or other is None or first.policy == "none":
        return ""
    points = 100 * (other - one)
    errors = first.step_time_saved_error, second.step_time_saved_error
    within = ""
    if None not in errors and abs(other - one) < 2 * sum(e * e for e in errors if e) ** 0.5:
        within = ", which is within noise"
    saves = f"{_name(first.key)}: A saves {one:.1%} of the step time and B"
    if abs(points) < 0.05:
        return f"{saves} as much."
    more = "more" if points > 0 else "less"
    return f"{saves} {other:.1%}, {abs(points):.1f} percentage points {more}{within}."


def _figures(row: _Row) -> dict[str, float | None]:
    return {
        "imbalance": row.imbalance,
        "balancedness": row.balancedness,
        "step_seconds": row.step_seconds,
        "step_time_saved": row.step_time_saved,
        "plans_committed": row.plans.get("committed", 0),
        "plans_made": sum(row.plans.values()),
        "experts_moved": row.experts_moved,
        "bytes_moved": row.bytes_moved,
        "stall_seconds": row.stall_seconds,
    }


def _compared(first: _Row, second: _Row) -> dict[str, Any]:
    one, other = _figures(first), _figures(second)
    figures = {
        name: {
            "first": one[name],
            "second": other[name],
            "difference": _minus(other[name], one[name]),
        }
        for name in _MEASURES
    }
    policy, ranks, redundant = first.key
    return {"policy": policy, "ep_size": ranks, "redundant_experts": redundant, **figures}


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _cells(row: dict[str, Any]) -> list[list[str]]:
    """A line for each result and one for the difference."""
    names = [row["policy"], f"{row['ep_size']}+{row['redundant_experts']}"]
    titles = {"first": "A", "second": "B", "difference": "B-A"}
    return [
        [
            *(names if which == "first" else ["", ""]),
            title,
            *(
                _cell(one, row[name][which], "+" if which == "difference" else "")
                for name, one in _MEASURES.items()
                if one.title
            ),
        ]
        for which, title in titles.items()
    ]


def _cell(measure: _Measure, value: float | None, sign: str) -> str:
    if value is None:
        return "-"
    if not measure.digits:
        return f"{'-' if value < 0 else sign}{decimal(abs(int(value)))}"
    return format(
        value * measure.scale if measure.scale != 1.0 else value, f"{sign}{measure.digits}"
    )


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """A row as CSV has it."""
    flattened: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flattened |= {f"{key}_{which}": one for which, one in value.items()}
        else:
            flattened[key] = value
    return flattened
