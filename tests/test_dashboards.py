"""Dashboards and alerts: whole, consistent, and about metrics that exist. What they show of a live server
is tested in tests/server.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ep_rebalance.commands.app import app
from ep_rebalance.dashboards.build import DASHBOARDS, expressions, stale, undefined_metrics, write
from ep_rebalance.dashboards.promql import ours, vllm

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
FILES = sorted((FOLDER / "grafana").glob("*.json"))
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)"
)


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def filled(expression: str) -> str:
    """With values for Grafana's variables."""
    for name, value in {"$__rate_interval": "1m", "$__range": "1h"}.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$\w+", ".+", expression)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


def test_files_are_what_the_code_makes():
    assert stale(FOLDER) == []


def test_a_file_that_is_old_is_named(tmp_path: Path):
    shutil.copy(FOLDER / "alerts.yaml", tmp_path)
    write(tmp_path)
    assert stale(tmp_path) == []
    path = tmp_path / "grafana" / "ep-rebalance-overview.json"
    path.write_text(path.read_text().replace("Imbalance", "imbalance"))
    assert stale(tmp_path) == ["grafana/ep-rebalance-overview.json"]


def test_each_dashboard_has_a_place_of_its_own():
    loaded = [load(path) for path in FILES]
    assert len(loaded) == len(DASHBOARDS) == 3
    assert [d["uid"] for d in loaded] == [path.stem for path in FILES]
    assert all(d["title"].startswith("ep_rebalance / ") and d["id"] is None for d in loaded)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_neither_overlap_nor_share_a_number(path: Path):
    dashboard = load(path)
    numbers = [panel["id"] for panel in panels(dashboard)]
    assert len(numbers) == len(set(numbers))
    for one, other in combinations((p["gridPos"] for p in panels(dashboard)), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart or below, (one, other)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels(dashboard))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_panel_says_what_it_is_made_of(path: Path):
    for panel in panels(load(path)):
        if panel["type"] == "row":
            continue
        text, _, names = panel["description"].rpartition("\n\nMetric: ")
        assert len(text) > 15
        asked = {name for t in panel["targets"] for name in metrics_in(t["expr"])}
        assert asked == set(re.findall(r"`(.+?)`", names)), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def metrics_in(expression: str) -> set[str]:
    names = re.findall(r"((?:vllm:|ep_rebalance_)\w+)\{", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_expression_is_over_defined_metrics_of_the_chosen_servers(path: Path):
    dashboard = load(path)
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    for title, expression in expressions(dashboard):
        assert undefined_metrics(expression) == set(), title
        used = set(re.findall(r"\$(\w+)", expression))
        assert used <= known | {"__rate_interval", "__range"}, title
        for labels in re.findall(r"\{(.*?)\}", expression):
            assert {"$job", "$model_name", "$instance"} <= set(re.findall(r"\$\w+", labels)), title


def test_a_metric_that_the_table_lacks_is_noticed():
    assert undefined_metrics('rate(ep_rebalance_typo_total{job="v"}[1m])') == {
        "ep_rebalance_typo_total"
    }
    assert undefined_metrics("ep_rebalance_plans") == {"ep_rebalance_plans"}
    assert undefined_metrics("ep_rebalance:imbalance:ratio_rate5m + vllm:x") == set()
    for wrong in ("typo", "plans", "plan_duration_seconds"):
        with pytest.raises(KeyError, match="no metric of the table"):
            ours(wrong)
    with pytest.raises(KeyError, match="has no label outcom"):
        ours("plans_total", outcom="failed")
    with pytest.raises(KeyError, match="live server"):
        vllm("typo")


@needs_promtool
def test_prometheus_can_parse_every_expression(tmp_path: Path):
    rules = [
        {"record": f"{path.stem.replace('-', '_')}_{number}", "expr": filled(expression)}
        for path in FILES
        for number, (_, expression) in enumerate(expressions(load(path)))
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    checked = promtool("check", "rules", path)
    assert "FAILED" not in checked.stdout + checked.stderr, checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


def test_every_alert_has_a_section_of_the_runbook():
    runbook = (FOLDER / "RUNBOOK.md").read_text()
    sections = re.findall(r"^## (\w+)$", runbook, re.MULTILINE)
    assert sections == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"RUNBOOK.md#{alert['alert'].lower()}"
        assert {"summary", "description"} <= set(alert["annotations"])


def test_alerts_are_over_defined_metrics():
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert undefined_metrics(rule["expr"]) == set()


def test_every_alert_is_tested_for_firing_and_for_silence():
    tests = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text())["tests"]
    asked = [asked for test in tests for asked in test["alert_rule_test"]]
    for alert in ALERTS:
        mine = [bool(test["exp_alerts"]) for test in asked if test["alertname"] == alert["alert"]]
        assert {True, False} <= set(mine), alert["alert"]


@needs_promtool
def test_alerts_fire_when_they_should():
    assert promtool("check", "rules", FOLDER / "alerts.yaml").returncode == 0
    tested = promtool("test", "rules", FOLDER / "alerts.test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
@pytest.mark.parametrize("change", [("> 1.3", "> 1.6"), ("for: 30m", "for: 1m"), (">= 3", ">= 5")])
def test_the_tests_of_the_alerts_can_fail(change: tuple[str, str], tmp_path: Path):
    text = (FOLDER / "alerts.yaml").read_text()
    assert change[0] in text
    (tmp_path / "alerts.yaml").write_text(text.replace(*change))
    shutil.copy(FOLDER / "alerts.test.yaml", tmp_path)
    assert promtool("test", "rules", tmp_path / "alerts.test.yaml").returncode != 0


@needs_promtool
def test_the_example_for_prometheus_is_valid():
    checked = promtool("check", "config", FOLDER / "compose" / "prometheus.yaml")
    assert checked.returncode == 0, checked.stderr


def test_kubernetes_gets_the_same_rules_and_all_dashboards():
    rule = yaml.safe_load((FOLDER / "kubernetes" / "prometheusrule.yaml").read_text())
    assert (rule["kind"], rule["spec"]) == ("PrometheusRule", RULES)
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (config_map,) = kustomization["configMapGenerator"]
    assert {FOLDER / name for name in config_map["files"]} == set(FILES)
    assert all((FOLDER / name).is_file() for name in kustomization["resources"])


def test_containers_mount_files_that_are_there():
    compose = yaml.safe_load((FOLDER / "compose" / "docker-compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            assert (FOLDER / "compose" / volume.partition(":")[0]).exists(), volume


def test_the_command_copies_what_is_needed_and_nothing_twice(tmp_path: Path):
    out = tmp_path / "new" / "folder"
    done = CliRunner().invoke(app, ["dashboards", "--out", str(out)])
    assert done.exit_code == 0, done.output
    copied = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    source = {
        path.relative_to(FOLDER)
        for path in FOLDER.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert copied == source
    (out / "alerts.yaml").write_text("mine")
    again = CliRunner().invoke(app, ["dashboards", "--out", str(out)])
    assert again.exit_code == 2
    assert "--force" in again.output
    assert (out / "alerts.yaml").read_text() == "mine"
    assert CliRunner().invoke(app, ["dashboards", "--out", str(out), "--force"]).exit_code == 0
    assert (out / "alerts.yaml").read_text() != "mine"


def test_the_command_lists_and_checks():
    listed = CliRunner().invoke(app, ["dashboards"])
    assert [d.uid for d in DASHBOARDS] == re.findall(r"^(ep-rebalance-\w+)", listed.output, re.M)
    assert CliRunner().invoke(app, ["dashboards", "--check"]).exit_code == 0


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["dashboards", "--out", str(tmp_path / "file" / "x")])
    assert done.exit_code == 2
    assert "cannot be written" in done.output
