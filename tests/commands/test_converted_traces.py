"""What the commands say of a trace that was converted: it knows no ranks, no times, and no expert's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

pytestmark = pytest.mark.usefixtures("compiled_planner")

COUNTS_LE = np.array([[300, 300, 100, 100], [100, 100, 100, 100]])
SNAPSHOTS = 60


@pytest.fixture
def trace(tmp_path: Path) -> str:
    np.save(tmp_path / "counts.npy", np.tile(COUNTS_LE, (SNAPSHOTS, 1, 1)))
    path = tmp_path / "load.eptrace"
    done = run("convert", str(tmp_path / "counts.npy"), str(path), "--top-k", "1", "--axes", "WLE")
    assert done.exit_code == 0, done.output
    return str(path)


def replayed(trace: str, *options: str) -> dict[str, Any]:
    done = run("replay", trace, "--ep-size", "2", "--format", "json", "--jobs", "1", *options)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_fraction_of_a_step_with_even_load_waits_for_experts(trace: str):
    none = ("--policy", "none", "--expert-time-fraction", "0.5")
    (uneven,) = replayed(trace, *none)["rows"]
    # Of two ranks one has 600 of 800 pairs in the first layer, and half of 400 in the second.
    waits = (600 + 200) / (400 + 200)
    (even,) = replayed(trace, *none, "--redundant", "4")["rows"]  # every expert on every rank
    assert uneven["step_seconds"] == pytest.approx(even["step_seconds"] * (0.5 + 0.5 * waits))
    table = run("replay", trace, "--ep-size", "2", *none, "--format", "table").stdout
    assert "of a step with even load is taken to wait" in " ".join(table.split())


def test_the_report_says_of_which_step_it_takes_a_fraction(trace: str, tmp_path: Path):
    report = tmp_path / "report.html"
    replayed(trace, "--policy", "none", "--report", str(report))
    assert "of a step with even load (expert_time_fraction)" in report.read_text()


def test_bytes_are_told_once_the_size_of_an_expert_is(trace: str):
    ours = ("--policy", "ours", "--policy", "none", "--set", "decision.min_gain_over_cost=0")
    row, _ = replayed(trace, *ours)["rows"]
    assert row["experts_moved"] > 0
    assert row["bytes_moved"] is row["bytes_moved_per_hour"] is row["stall_seconds"] is None
    size = ("--expert-bytes", "1000", "--hidden-size", "64")
    row, _ = replayed(trace, *ours, *size)["rows"]
    assert row["bytes_moved"] == 1000 * row["experts_moved"]
    assert row["stall_seconds"] > 0


def test_results_without_bytes_can_be_compared(trace: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(replayed(trace)))
    done = run("replay", "--compare", str(path), str(path), "--format", "json")
    assert done.exit_code == 0, done.output
    moved = json.loads(done.stdout)["rows"][0]["bytes_moved"]
    assert moved == {"first": None, "second": None, "difference": None}


def test_steps_are_modelled_with_the_size_that_is_given(trace: str, tmp_path: Path):
    assert "--model CONFIG" in run("replay", trace, "--ep-size", "2", "--hardware", "h20").stderr
    config = {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "hidden_size": 64,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))
    by_model = replayed(trace, "--hardware", "h20", "--model", str(tmp_path))
    size = ("--expert-bytes", str(2 * 3 * 64 * 32), "--hidden-size", "64")
    by_size = replayed(trace, "--hardware", "h20", *size)
    for one, other in zip(by_model["rows"], by_size["rows"], strict=True):
        assert one["step_seconds"] == other["step_seconds"]


def test_a_known_model_is_taken_by_its_name_and_another_is_refused(trace: str):
    done = run("advise", trace, "--hardware", "h20", "--model", "deepseek-v3")
    assert done.exit_code == 2
    assert "deepseek-v3 has 256 experts and top 8, the trace 4 and 1" in done.stderr


def test_inspect_does_not_call_it_balanced(trace: str):
    shown = " ".join(run("inspect", trace).stdout.split())
    assert "none recorded; `ep-rebalance replay --ep-size 8`" in shown
    assert "imbalance served" not in shown
