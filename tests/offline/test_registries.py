"""One entry is all it takes: a policy and a file format that are added appear wherever the others do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from command_line import run
from saved_states import PLACEMENT, STATE
from traces import head_of, write_trace

from ep_rebalance.load.state import save_state
from ep_rebalance.offline.hardware_table import hardware_names
from ep_rebalance.policies import POLICIES

pytest.importorskip("plotly")

SNAPSHOTS = 30

# In a process of its own: texts and choices are made of the entries when modules are imported.
ADDED = """
import json, sys
from types import MappingProxyType

from ep_rebalance import policies

policy = policies.Policy(
    name="sideways",
    summary="moves experts sideways",
    planner="ep_rebalance.planning.greedy:plan_greedy",
    bounded_arrivals=True,
    line=policies.Line("#123456", (7, 8)),
)
policies.POLICIES = MappingProxyType({**policies.POLICIES, policy.name: policy})

from ep_rebalance import formats

form = formats.Format(
    name="plain",
    summary="numbers in plain text",
    module="__main__",
    reads_load=True,
    reads_placement=True,
    writes_placement=True,
)
formats.FORMATS = MappingProxyType({**formats.FORMATS, form.name: form})

import numpy as np
from ep_rebalance.formats.format import replace_text
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.placement import Placement

def recognises(path):
    return path.suffix == ".plain"

def read_load(path, reading):
    return ForeignLoad(
        counts=[np.loadtxt(path, dtype=np.uint32, ndmin=2)],
        layers=2,
        experts=3,
        moe_layers=(0, 1),
        origin="plain text",
        top_k=2,
    )

def read_placement(path, reading):
    slots_LP = np.loadtxt(path, dtype=np.int32, ndmin=2)
    return reading.numbered(path, Placement(slots_LP, 4, reading.ranks_of(path)))

def write_placement(path, placement, moe_layers, writing):
    rows = placement.slots_LP.tolist()
    replace_text(path, "".join(" ".join(map(str, row)) + "\\n" for row in rows))

from typer.testing import CliRunner
from ep_rebalance.commands.app import app
from ep_rebalance.config_sources import load_config
from ep_rebalance.planning.policies import own_planners, staging_slots

found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    found[name] = done.output
    assert done.exit_code in (0, 2), done.exception
try:
    load_config({"planner": {"policy": "sidewards"}})
except ValueError as error:
    found["refused"] = str(error)
config = load_config({"planner": {"policy": "sideways", "max_arrivals_per_rank_and_layer": 3}})
found["planned"] = sorted(own_planners())
found["staging"] = staging_slots(config.planner, 1_000, 100, [1000] * 20)
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_trace(folder, head_of(), SNAPSHOTS)
    save_state(folder / "state.npz", STATE)
    (folder / "load.plain").write_text("1 2 3\n4 5 6\n")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Mapping[str, object]:
    traces, result = str(next(folder.glob("*.eptrace"))), str(folder / "result.json")
    state, plain = str(folder / "state.npz"), str(folder / "placement.plain")
    commands = {
        "replay help": ["replay", "--help"],
        "convert help": ["convert", "--help"],
        "plan help": ["plan", "--help"],
        "config": ["config"],
        "schema": ["config", "--json-schema"],
        "unknown policy": ["replay", traces, "--policy", "sidewards"],
        "unknown format": ["convert", state, plain, "--to", "plane"],
        "replay": ["replay", traces, "--policy", "sideways", "--policy", "none", "--jobs", "1",
                   "--format", "json", "--quiet", "--output", result, "--report",
                   str(folder / "report.html")],
        "write": ["convert", state, plain, "--to", "plain"],
        "read": ["convert", plain, str(folder / "placement.json"), "--to", "sglang", "--ep-size",
                 str(PLACEMENT.num_ranks)],
        "load": ["convert", str(folder / "load.plain"), str(folder / "converted.eptrace")],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ADDED, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs: dict[str, object] = json.loads(done.stdout)
    return outputs


def words(text: object) -> str:
    """Without the frames and line ends of a help text."""
    return " ".join(str(text).replace("│", " ").split())


def test_the_settings_know_an_added_policy(found: Mapping[str, object]) -> None:
    known = ", ".join([*POLICIES, "sideways"])
    assert f"# one of {known}" in str(found["config"])
    assert "`sideways`: moves experts sideways" in str(found["config"])
    assert '"sideways"' in str(found["schema"])
    assert "planner.policy='sidewards' is not allowed" in str(found["refused"])
    assert f"Input should be one of {known}." in str(found["refused"])


def test_an_added_policy_is_compiled_and_has_its_staging_memory(
    found: Mapping[str, object],
) -> None:
    assert "sideways" in found["planned"]  # type: ignore[operator]
    assert found["staging"] == 3


def test_an_added_policy_is_replayed(found: Mapping[str, object], folder: Path) -> None:
    assert "sideways: moves experts sideways, in the plugin's loop" in words(found["replay help"])
    assert "'sidewards' is not one of 'ours'" in words(found["unknown policy"])
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["sideways", "none"]
    assert rows[0]["plans"]


def test_an_added_policy_is_in_the_report(found: Mapping[str, object], folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "--sideways: #123456;" in page
    assert 'stroke-dasharray="7,8"' in page
    assert "Policy sideways would have" in page
    assert "<dd>moves experts sideways, in the plugin&#x27;s loop</dd>" in page


def test_an_added_format_can_be_chosen(found: Mapping[str, object]) -> None:
    for command in ("convert help", "plan help"):
        assert "|plain]" in str(found[command])
    assert "plain: numbers in plain text" in words(found["convert help"])
    assert "'plane' is not one of" in words(found["unknown format"])


def test_an_added_format_is_read_and_written(found: Mapping[str, object], folder: Path) -> None:
    assert "for plain" in words(found["write"])
    rows = json.loads((folder / "placement.json").read_text())["physical_to_logical_map"]
    assert rows == PLACEMENT.slots_LP.tolist()
    assert "1 snapshots, plain text" in words(found["load"])


def test_every_row_of_the_hardware_table_is_offered() -> None:
    for command in ("replay", "advise"):
        shown = words(run(command, "--help", COLUMNS="200").output)
        assert ", ".join(hardware_names()) in shown
