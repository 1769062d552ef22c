"""One file and one entry are all it takes: an exchange that is added is served like the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ep_rebalance.exchanges import EXCHANGES

ROOT = Path(__file__).resolve().parents[2]
ENTRY = """
    Exchange(
        name="gathered",
        summary="sends every row to every rank",
        all_to_all="ep_rebalance.all_to_all.gathered:Gathered",
    ),
"""
ASK = """
import json, sys
from pathlib import Path

from typer.testing import CliRunner

from ep_rebalance.commands.app import app
from ep_rebalance.config_sources import load_config
from ep_rebalance.diagnosis import settings

folder = Path(sys.argv[1])
found = {"config": CliRunner().invoke(app, ["config"]).output}
found["schema"] = CliRunner().invoke(app, ["config", "--json-schema"]).output
for name, plane in json.loads(sys.argv[2]).items():
    try:
        found[name] = load_config({"data_plane": plane}).data_plane.buffers
    except ValueError as error:
        found[name] = str(error)
    file = folder / "settings.json"
    file.write_text(json.dumps({"data_plane": plane}))
    found[f"doctor, {name}"] = " ".join(one.found for one in settings.settings(file))
json.dump(found, sys.stdout)
"""
PLANES = {
    "chosen": {"buffers": "gathered"},
    "unknown": {"buffers": "gatherd"},
    "by node": {"buffers": "gathered", "group_by_node": True},
    "in eight bits": {"buffers": "gathered", "payload": "fp8"},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that has the file and the entry."""
    folder = tmp_path_factory.mktemp("package")
    package = folder / "ep_rebalance"
    for source, target in (
        ("ep_rebalance", package),
        ("kernels", package / "kernels"),
        ("dashboards", package / "dashboards"),
    ):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, target, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(ROOT / "tests" / "support" / "gathered.py", package / "all_to_all")
    table = package / "exchanges.py"
    before, entries, after = table.read_text().partition("_ENTRIES = (")
    table.write_text(before + entries + ENTRY.rstrip() + after)
    return folder


def python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def found(package: Path) -> Mapping[str, str]:
    done = python(package, "-c", ASK, str(package), json.dumps(PLANES))
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout)
    return answers


def test_the_settings_know_an_added_exchange(found: Mapping[str, str]) -> None:
    (choices,) = re.findall(r'buffers: "exact"  # one of (.*)', found["config"])
    assert set(choices.split(", ")) == {*EXCHANGES, "gathered"}
    assert "`gathered` sends every row to every rank" in found["config"]
    assert '"gathered"' in found["schema"]
    assert found["chosen"] == "gathered"


def test_what_an_added_exchange_cannot_do_is_refused_with_what_can(
    found: Mapping[str, str],
) -> None:
    assert "data_plane.buffers='gatherd' is not allowed" in found["unknown"]
    assert "gathered" in found["unknown"].partition("Input should be one of ")[2]
    by_node = " or ".join(one.name for one in EXCHANGES.values() if one.by_node)
    eight_bits = " or ".join(one.name for one in EXCHANGES.values() if one.eight_bits)
    assert f"group_by_node works with buffers={by_node} only" in found["by node"]
    assert f"payload=fp8 works with buffers={eight_bits} only" in found["in eight bits"]


def test_doctor_reads_an_added_exchange(found: Mapping[str, str]) -> None:
    assert "mode rebalance" in found["doctor, chosen"]
    for name in ("unknown", "by node", "in eight bits"):
        assert found[f"doctor, {name}"] in found[name]


def test_an_added_exchange_is_held_to_what_every_exchange_is(package: Path) -> None:
    files = [f"tests/all_to_all/{name}.py" for name in ("test_all_to_all", "test_padded_rows")]
    chosen = "gathered and not dtype1"  # without those in bfloat16
    done = python(package, "-m", "pytest", "-p", "no:cacheprovider", "-q", *files, "-k", chosen)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40
