"""Panels: one function for each kind that we use, made into dictionaries of Grafana's JSON model.

Colours mean the same everywhere: blue is what is served, orange what it would be without rebalancing,
green is good news, and red a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ep_rebalance.dashboards.promql import metrics_in, quantile

SERVED, WITHOUT, GOOD, FAULT, PLAIN = "blue", "orange", "green", "red", "text"
OUTCOMES = {
    "committed": GOOD,
    "no_gain": PLAIN,
    "over_budget": WITHOUT,
    "abandoned": "dark-red",
    "failed": FAULT,
}
LINKS = {"local": GOOD, "intranode": SERVED, "internode": WITHOUT}
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of a panel.

    legend: names each series; `{{label}}` stands for a label's value.
    instant: whether only the newest value is queried.
    """

    expr: str
    legend: str = "__auto"
    colour: str | None = None
    instant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    text: its description; the metrics that it uses are added.
    kind: Grafana's type of panel.
    width, height: in units of Grafana's grid, which is 24 wide.
    steps: (from this value on, colour).
    named: colours of series by their legend.
    """

    title: str
    text: str
    queries: Sequence[Query]
    kind: str
    width: int
    height: int
    unit: str = "none"
    decimals: int | None = None
    steps: Sequence[tuple[float | None, str]] = ((None, PLAIN),)
    mappings: Sequence[Json] = ()
    lowest: float | None = None
    highest: float | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    custom: Mapping[str, Any] = field(default_factory=dict)
    colour: Mapping[str, Any] = field(default_factory=lambda: {"mode": "thresholds"})
    options: Mapping[str, Any] = field(default_factory=dict)
    transformations: Sequence[Json] = ()

    def json(self) -> Json:
        """The panel in Grafana's JSON model, without position and id."""
        names = metrics_in(" ".join(query.expr for query in self.queries))
        return {
            "type": self.kind,
            "title": self.title,
            "description": f"{self.text}\n\nMetric: " + ", ".join(f"`{name}`" for name in names),
            "datasource": DATASOURCE,
            "targets": [
                _target(query, number, self.kind) for number, query in enumerate(self.queries)
            ],
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": dict(self.options),
            "transformations": list(self.transformations),
        }

    def _defaults(self) -> Json:
        defaults: Json = {
            "unit": self.unit,
            "color": dict(self.colour),
            "custom": dict(self.custom),
            "mappings": [_NO_TRAFFIC, *self.mappings],
            "noValue": "No traffic",
            "thresholds": {
                "mode": "absolute",
                "steps": [{"color": colour, "value": value} for value, colour in self.steps],
            },
        }
        bounds = {"decimals": self.decimals, "min": self.lowest, "max": self.highest}
        return defaults | {name: value for name, value in bounds.items() if value is not None}

    def _overrides(self) -> list[Json]:
        """Fixed colours, of queries and of named series."""
        of_queries = [
            ("byFrameRefID", _letter(number), query.colour)
            for number, query in enumerate(self.queries)
            if query.colour
        ]
        of_names = [("byName", name, colour) for name, colour in self.named.items()]
        return [
            {
                "matcher": {"id": matcher, "options": options},
                "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
            }
            for matcher, options, colour in of_queries + of_names
        ]


DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_NO_TRAFFIC = {
    "type": "special",
    "options": {"match": "nan", "result": {"index": 0, "text": "No traffic"}},
}


def stat(title: str, text: str, expr: str, **more: Any) -> Panel:
    """A tile with one number."""
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "value",
    }
    place = {"kind": "stat", "width": 3, "height": 4, "options": options}
    return Panel(
        **{"title": title, "text": text, "queries": [Query(expr=expr)],
           **place, **more}
    )  # fmt: skip


def timeseries(title: str, text: str, queries: Sequence[Query], **more: Any) -> Panel:
    """Lines over time; with `bars=True` stacked bars."""
    custom: Json = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 2,
        "fillOpacity": 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "none", "group": "A"},
    }
    if more.pop("bars", False):
        custom |= {"drawStyle": "bars", "fillOpacity": 80, "lineWidth": 1}
        custom["stacking"] = {"mode": "normal", "group": "A"}
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    place = {"kind": "timeseries", "width": 12, "height": 8, "options": options, "custom": custom}
    return Panel(
        **{"title": title, "text": text, "queries": queries,
           "colour": {"mode": "palette-classic"}, **place, **more}
    )  # fmt: skip


def rows_over_time(title: str, text: str, query: Query, **more: Any) -> Panel:
    """A heat map over time, one row for each series."""
    options = {
        "showValue": "never",
        "rowHeight": 0.95,
        "colWidth": 1,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    place = {"kind": "status-history", "width": 12, "height": 12, "options": options,
             "custom": {"lineWidth": 0, "fillOpacity": 100}}  # fmt: skip
    return Panel(
        **{"title": title, "text": text, "queries": [query],
           "colour": {"mode": "continuous-BlYlRd"}, **place, **more}
    )  # fmt: skip


def matrix(
    title: str,
    text: str,
    query: Query,
    *,
    row: str,
    column: str,
    **more: Any,
) -> Panel:
    """A table of coloured cells with the newest values: a row for each value of the label `row`, a column
    for each of the label `column`.
    """
    by = {"rowField": row, "columnField": column, "valueField": "Value"}
    options = {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": []}}
    place = {"kind": "table", "width": 24, "height": 14, "options": options,
             "custom": {"align": "center", "cellOptions": {"type": "color-background"}}}  # fmt: skip
    return Panel(
        **{"title": title, "text": text, "queries": [query],
           "colour": {"mode": "continuous-BlYlRd"}, **place, **more},
        transformations=[{"id": "groupingToMatrix", "options": by}],
    )  # fmt: skip


def bars(title: str, text: str, query: Query, **more: Any) -> Panel:
    """A bar for each series, with its newest value."""
    options = {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "showUnfilled": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    place = {"kind": "bargauge", "width": 12, "height": 8, "options": options}
    return Panel(**{"title": title, "text": text, "queries": [query], **place, **more})


def percentiles(buckets: str, *parts: float) -> tuple[Query, ...]:
    """Queries for lines at some quantiles, e.g. 0.5 and 0.99, of a histogram."""
    return tuple(Query(expr=quantile(part, buckets), legend=f"p{100 * part:g}") for part in parts)


def names(*values: tuple[float, str, str]) -> list[Json]:
    """A mapping of exact values to words and colours: (value, word, colour)."""
    options = {
        f"{value:g}": {"index": index, "text": text, "color": colour}
        for index, (value, text, colour) in enumerate(values)
    }
    return [{"type": "value", "options": options}]


def _target(query: Query, number: int, kind: str) -> Json:
    target: Json = {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "refId": _letter(number),
    }
    if query.instant:
        target |= {"instant": True, "range": False}
    if kind == "table":
        target["format"] = "table"
    return target


def _letter(number: int) -> str:
    return chr(ord("A") + number)
