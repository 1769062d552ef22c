"""Build: generates files from code, and checks whether those on disk are up to date.

`python -m ep_rebalance.dashboards.build FOLDER` writes them, as `make dashboards` does. `ep-rebalance
dashboards --check` checks those of the package.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ep_rebalance.dashboards.migration import MIGRATION
from ep_rebalance.dashboards.overview import OVERVIEW
from ep_rebalance.dashboards.placement import PLACEMENT
from ep_rebalance.dashboards.promql import SERIES

DASHBOARDS = (OVERVIEW, PLACEMENT, MIGRATION)
RULES = "alerts.yaml"
KUBERNETES_RULES = "kubernetes/prometheusrule.yaml"


def generated(folder: Path) -> dict[str, str]:
    """The text of each generated file, by its path below `folder`. The alert rules are read from `folder`."""
    files = {
        f"grafana/{dashboard.uid}.json": json.dumps(dashboard.json(), indent=2) + "\n"
        for dashboard in DASHBOARDS
    }
    rules = yaml.safe_load((folder / RULES).read_text(encoding="utf-8"))
    files[KUBERNETES_RULES] = _kubernetes(rules)
    return files


def stale(folder: Path) -> list[str]:
    """Generated files that are missing in `folder`, or differ from what the code generates."""
    return [
        name
        for name, text in generated(folder).items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def write(folder: Path) -> None:
    """Write all generated files below `folder`, which holds the alert rules."""
    for name, text in generated(folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(panel's title, expression) of a dashboard's JSON, including panels in collapsed rows."""
    for panel in dashboard["panels"]:
        for inner in [panel, *panel.get("panels", [])]:
            for target in inner.get("targets", []):
                yield inner["title"], target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        if "target" in annotation:
            yield annotation["name"], annotation["target"]["expr"]


def undefined_metrics(expression: str) -> set[str]:
    """Names in `expression` that look like our metrics and are not in the table."""
    # Those with a colon are recorded series.
    names = re.findall(r"(?<![\w:])ep_rebalance_\w+(?!\w*:)", expression)
    return set(names) - SERIES.keys()


def _kubernetes(rules: dict[str, Any]) -> str:
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "ep-rebalance", "labels": {"release": "prometheus"}},
        "spec": rules,
    }
    text: str = yaml.safe_dump(rule, sort_keys=False, width=110)
    return f"# Made from ../{RULES}.\n{text}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
