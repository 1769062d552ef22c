"""Layout: rows of panels as one dashboard of Grafana's JSON model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_rebalance.dashboards.panels import DATASOURCE, Json, Panel
from ep_rebalance.dashboards.promql import ours

COLUMNS = 24
SCHEMA_VERSION = 39
TAGS = ["vllm", "ep-rebalance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under a title.

    title: "" for the row at the top.
    collapsed: whether it is closed at first, since only some servers have data for it.
    """

    title: str = ""
    panels: Sequence[Panel]
    collapsed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """A dashboard.

    uid: never changes, since links and bookmarks contain it.
    text: its description.
    """

    uid: str
    title: str
    text: str
    rows: Sequence[Row]

    def json(self) -> Json:
        """The dashboard in Grafana's JSON model."""
        return {
            "annotations": {"list": [_BUILT_IN, _COMMITS]},
            "description": self.text,
            "editable": True,
            "fiscalYearStartMonth": 0,
            "graphTooltip": 1,
            "id": None,
            "links": [_LINKS],
            "panels": _placed(self.rows),
            "refresh": "30s",
            "schemaVersion": SCHEMA_VERSION,
            "tags": TAGS,
            "templating": {"list": _VARIABLES},
            "time": {"from": "now-1h", "to": "now"},
            "timepicker": {},
            "timezone": "",
            "title": f"ep_rebalance / {self.title}",
            "uid": self.uid,
            "version": 1,
        }


def _placed(rows: Sequence[Row]) -> list[Json]:
    """All panels with their positions. Grafana wants those of a collapsed row inside the row."""
    placed: list[Json] = []
    top = 0
    numbers = iter(range(1, 1000))
    for row in rows:
        inside: list[Json] = []
        if row.title:
            header = {
                "type": "row",
                "title": row.title,
                "collapsed": row.collapsed,
                "panels": inside if row.collapsed else [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
                "id": next(numbers),
            }
            placed.append(header)
            top += 1
        target = inside if row.collapsed else placed
        left = height = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, top, height = 0, top + height, 0
            place = {"h": panel.height, "w": panel.width, "x": left, "y": top}
            target.append({**panel.json(), "gridPos": place, "id": next(numbers)})
            left, height = left + panel.width, max(height, panel.height)
        top += height
    return placed


_BUILT_IN = {
    "builtIn": 1,
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": True,
    "iconColor": "rgba(0, 211, 255, 1)",
    "name": "Annotations & Alerts",
    "type": "dashboard",
}
_COMMITS = {
    "datasource": DATASOURCE,
    "enable": True,
    "iconColor": "purple",
    "name": "Placement changed",
    "target": {"expr": f"changes({ours('placement_generation')}[1m]) > 0", "refId": "commits"},
    "titleFormat": "Placement changed",
}
_LINKS = {
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "tags": TAGS,
    "targetBlank": False,
    "title": "ep_rebalance dashboards",
    "tooltip": "",
    "type": "dashboards",
    "url": "",
}


def _choice(name: str, label: str, within: str) -> Json:
    query = f"label_values(ep_rebalance_info{{{within}}}, {name})"
    return {
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": DATASOURCE,
        "includeAll": True,
        "label": label,
        "multi": True,
        "name": name,
        "query": {"query": query, "refId": "variables"},
        "refresh": 2,
        "sort": 1,
        "type": "query",
    }


_VARIABLES = [
    {
        "label": "Data source",
        "name": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "type": "datasource",
    },
    _choice("job", "Job", ""),
    _choice("model_name", "Model", 'job=~"$job"'),
    _choice("instance", "Instance", 'job=~"$job", model_name=~"$model_name"'),
    {
        "datasource": DATASOURCE,
        "label": "Filters",
        "name": "filters",
        "type": "adhoc",
    },
]
