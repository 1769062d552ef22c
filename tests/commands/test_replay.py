"""`ep-rebalance replay`, `advise` and `inspect`."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from command_line import run, server
from saved_states import STATE
from statuses import make_status
from traces import REPLAYED, snapshots, write_trace

from ep_rebalance.config_sources import load_config
from ep_rebalance.formats import vllm_ascend
from ep_rebalance.formats.format import Reading
from ep_rebalance.load.state import save_state
from ep_rebalance.load.trace import TraceReader
from ep_rebalance.placement import imbalance_L

pytestmark = pytest.mark.usefixtures("compiled_planner")


def replayed(folder: Path, *options: str) -> dict:
    done = run("replay", str(folder), "--format", "json", "--jobs", "1", *options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# --- replay


def test_json_holds_trace_settings_and_a_row_for_each_policy(folder: Path):
    result = replayed(folder)
    assert [row["policy"] for row in result["rows"]] == ["ours", "none", "hindsight"]
    assert result["schema_version"] == 1
    assert result["trace"]["snapshots"] == 40
    assert result["trace"]["origin"] == "generated"
    assert load_config(result["config"]).planner.redundant_experts == 4
    ours, none, best = result["rows"]
    assert 0 < ours["step_time_saved"] < best["step_time_saved"]
    assert 0 < none["home_share"] < ours["home_share"] < ours["node_share"] == 1
    assert none["step_time_saved"] == 0
    assert ours["experts_moved"] == sum(c["experts_moved"] for c in ours["commits"]) > 0


def test_several_sizes_and_policies_at_a_time_give_the_same_as_one(folder: Path):
    sizes = ("--ep-size", "2", "--ep-size", "4", "--redundant", "0", "--redundant", "4")
    both = ("--policy", "ours", "--policy", "static")
    done = run("replay", str(folder), *sizes, *both, "--format", "json", "--jobs", "2")
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 8
    for one in rows:
        size = ("--ep-size", str(one["ep_size"]), "--redundant", str(one["redundant_experts"]))
        (alone,) = replayed(folder, *size, "--policy", one["policy"])["rows"]
        assert {**alone, "plan_milliseconds": 0} == {**one, "plan_milliseconds": 0}


def test_the_table_fits_80_columns(folder: Path):
    done = run("replay", str(folder), "--format", "table", COLUMNS="80")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout
    assert any(line.split()[:2] == ["ours", "4+4"] for line in lines)


def test_what_waits_for_experts_is_set_or_told(folder: Path):
    only = ("--policy", "none")
    told = replayed(folder, *only)["expert_time"]
    assert (told["fraction"], told["source"]) == (0.5, "assumed")
    assert "no server was recorded" in told["reason"]
    set_ = replayed(folder, *only, "--set", "decision.expert_time_fraction=0.3")["expert_time"]
    assert (set_["fraction"], set_["source"]) == (0.3, "set")
    option = replayed(folder, *only, "--expert-time-fraction", "0.4")["expert_time"]
    assert (option["fraction"], option["source"]) == (0.4, "set")
    table = run("replay", str(folder), *only, "--format", "table").stdout
    assert "50% (standard error 25%, assumed)" in " ".join(table.split())


def test_csv_has_a_line_for_each_policy(folder: Path, tmp_path: Path):
    output = tmp_path / "replay.csv"
    done = run("replay", str(folder), "--format", "csv", "--output", str(output))
    assert done.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [row["policy"] for row in rows] == ["ours", "none", "hindsight"]
    assert float(rows[0]["imbalance"]) < float(rows[1]["imbalance"])


def test_settings_come_from_file_and_options(folder: Path, tmp_path: Path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"planner": {"seed": 7, "redundant_experts": 4}}))
    options = ("--config", str(settings), "--set", "decision.min_gain=0.5", "--policy", "ours")
    result = replayed(folder, *options)
    assert result["config"]["planner"]["seed"] == 7
    assert result["rows"][0]["experts_moved"] == 0


def test_hardware_models_the_step(folder: Path, tmp_path: Path):
    table = tmp_path / "own.yaml"
    shipped = yaml.safe_load(run("hardware").stdout)
    slow = {**shipped["h100-sxm"], "memory_bytes_per_second": 1e6}
    table.write_text(yaml.safe_dump({"slow": slow}))
    fast, slower = (
        replayed(folder, "--policy", "none", "--hardware", name)["rows"][0]["step_seconds"]
        for name in ("h100-sxm", str(table))
    )
    assert fast < 0.01 < slower


def test_gain_can_be_asked_for(folder: Path):
    options = ("--policy", "ours", "--policy", "none", "--quiet")
    assert run("replay", str(folder), *options, "--fail-below-gain", "0.01").exit_code == 0
    refused = run("replay", str(folder), *options, "--fail-below-gain", "0.9")
    assert refused.exit_code == 1
    assert "less than 90.00%" in refused.stderr
    assert run("replay", str(folder), "--policy", "ours", "--fail-below-gain", "0").exit_code == 2


def test_a_report_is_written(folder: Path, tmp_path: Path):
    pytest.importorskip("plotly")
    report = tmp_path / "report.html"
    assert run("replay", str(folder), "--report", str(report)).exit_code == 0
    assert report.read_text().startswith("<!doctype html>")
    missing = run("replay", str(folder), "--report", str(tmp_path / "no" / "report.html"))
    assert missing.exit_code == 2
    assert "cannot be written" in missing.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--redundant", "3"], "possible are 0, 4, 8", id="slots"),
        pytest.param(["--set", "planner.nonsense=1"], "unknown configuration key", id="key"),
        pytest.param(["--set", "planner"], "KEY=VALUE", id="assignment"),
        pytest.param(["--hardware", "abacus"], "known are h100-sxm", id="hardware"),
        pytest.param(
            ["--policy", "recorded", "--ep-size", "2"], "recorded numbers of ranks", id="recorded"
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(folder: Path, options: list[str], words: str):
    done = run("replay", str(folder), *options)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_files_that_are_no_traces_are_one_sentence(tmp_path: Path):
    assert "no *.eptrace in" in run("replay", str(tmp_path)).stderr
    other = tmp_path / "x.eptrace"
    other.write_text("{}")
    assert "byte 0: this is not a trace" in run("replay", str(other)).stderr
    assert "there is no such file" in run("replay", str(tmp_path / "none.eptrace")).stderr


def test_processes_start_from_the_command(folder: Path):
    """As a console script does; children import the package anew."""
    command = [sys.executable, "-c", "from ep_rebalance.commands.app import main\nmain()"]
    options = ["replay", str(folder), "--jobs", "2", "--policy", "ours", "--policy", "none"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 2


# --- advise


def test_options_are_ranked_with_reasons_and_a_command(folder: Path):
    options = ("--hardware", "h100-sxm", "--gpus", "2", "--gpus", "4", "--json")
    done = run("advise", str(folder), *options, "--jobs", "1")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 2 * 3 + 2
    each = [row["tokens_per_second"] / row["ranks"] for row in rows]
    assert each == sorted(each, reverse=True)
    assert all(row["reason"] for row in rows)
    for row in rows:
        flag = "--data-parallel-size" if row["expert_parallel"] else "--tensor-parallel-size"
        assert f"vllm serve tiny {flag} {row['ranks']}" in row["command"]
        assert ("--plugin" in row["command"]) == (row["saved"] >= 0.01)
        slots = (32 + row["redundant"]) // row["ranks"]
        if row["expert_parallel"]:
            assert row["weight_bytes"] == slots * 3 * 1000
        for phase in row["phases"]:
            told = f"{phase['phase']}, {phase['tokens_per_rank']:.0f} tokens a GPU: mostly"
            assert told in row["reason"]
        assert (row["phases"] != []) == row["expert_parallel"]
    balanced = {(row["ranks"], row["redundant"]): row["imbalance"] for row in rows[:6]}
    assert min(balanced.values()) < 1.2


def test_what_does_not_fit_comes_last(folder: Path):
    options = ("--hardware", "h100-sxm", "--gpus", "2", "--gpus", "4", "--json", "--jobs", "1")
    done = run("advise", str(folder), *options, "--memory", "1")
    assert all(row["fits"] for row in json.loads(done.stdout)["rows"])


def test_gpus_that_cannot_share_the_experts_are_refused(folder: Path):
    done = run("advise", str(folder), "--hardware", "h100-sxm", "--gpus", "2", "--redundant", "40")
    assert done.exit_code == 2
    assert "cannot be shared" in done.stderr


# --- plan


def test_a_placement_for_the_whole_trace_is_written(folder: Path, tmp_path: Path):
    output = tmp_path / "map.json"
    options = ("--to", "vllm-ascend", "-o", str(output), "--first-moe-layer", "1")
    done = run("plan", str(folder), *options)
    assert done.exit_code == 0, done.output
    placement, layers = vllm_ascend.read_placement(output, Reading())
    assert layers == (1, 2, 3)
    assert (placement.num_ranks, placement.num_slots) == (4, 36)
    total_LE = sum(s.counts_ALE.sum(axis=0, dtype=int) for s in snapshots(REPLAYED, 40))
    assert imbalance_L(placement.rank_load_LR(total_LE)).max() < 1.15
    assert "placed" in done.stderr
    other = ("--ep-size", "8", "--redundant", "8", "--to", "sglang", "-o", str(tmp_path / "l.json"))
    assert run("plan", str(folder), *other).exit_code == 0
    refused = run("plan", str(folder), "--redundant", "3", "--to", "sglang", "-o", str(output))
    assert "possible are" in refused.stderr


# --- inspect


def test_a_trace_is_summed_up(folder: Path):
    found = json.loads(run("inspect", str(folder), "--json").stdout)
    loads = [snapshot.counts_ALE for snapshot in snapshots(REPLAYED, 40)]
    assert found["snapshots"] == 40
    assert found["steps"] == 640
    assert sum(found["tokens"].values()) == pytest.approx(sum(c.sum() for c in loads) / 6, abs=2)
    layer, expert, share = found["hottest"][0]
    total_LE = sum(c.sum(axis=0, dtype=int) for c in loads)
    assert share == pytest.approx(total_LE[layer, expert] / total_LE[layer].mean())
    assert share == pytest.approx((total_LE / total_LE.mean(axis=1, keepdims=True)).max())
    assert "generated" in run("inspect", str(folder)).stdout


def test_a_trace_that_grows_shows_what_is_there(tmp_path: Path):
    path = write_trace(tmp_path, REPLAYED, 3)
    path.write_bytes(path.read_bytes()[:-8])
    shown = run("inspect", str(path)).stdout
    assert "a record that is being written" in shown
    assert sum(1 for _ in TraceReader(path)) == 3


def test_a_state_file_is_shown(tmp_path: Path):
    path = tmp_path / "state.npz"
    save_state(path, STATE)
    found = json.loads(run("inspect", str(path), "--json").stdout)
    assert (found["generation"], found["identity"]["model"]) == (7, "org/model")
    assert "state of org/model" in run("inspect", str(path)).stdout
    path.write_bytes(path.read_bytes()[:-1])
    assert "digest" in run("inspect", str(path)).stderr


def test_a_live_server_is_shown():
    with server(200, msgspec.json.encode(make_status())) as (url, _):
        assert "rebalance, incremental" in run("inspect", url).stdout
    assert run("inspect", url).exit_code == 2


def test_only_a_live_server_can_be_watched(folder: Path):
    done = run("inspect", str(folder), "--watch")
    assert done.exit_code == 2
    assert "--watch shows a live server" in done.stderr
