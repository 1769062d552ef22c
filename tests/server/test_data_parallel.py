"""Two data-parallel ranks: one server for all tests here, since idle vLLM workers keep a core busy."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from answers import MIGRATIONS, answers_across_migrations, assert_counts_are_right
from engines import V032
from metrics_page import assert_metrics_agree
from serving import OPERATOR, Server, prompts
from typer.testing import CliRunner

from ep_rebalance.commands.app import app
from ep_rebalance.load.trace import RecordedPlacement, TraceReader

pytestmark = V032.marks


def test_data_parallel_answers_equal_one_rank_without_the_plugin(
    data_parallel: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    asked = answers_across_migrations(data_parallel, questions)
    assert len(questions) >= 20
    for when, answers in asked.items():
        assert answers == one_rank_answers * (len(answers) // len(questions)), when


def test_every_migration_moved_experts(data_parallel: Server) -> None:
    status = data_parallel.status()
    assert status["plans"]["committed"] >= MIGRATIONS
    assert sum(status["migrated_experts"].values()) >= MIGRATIONS
    assert status["plans"]["abandoned"] == status["plans"]["failed"] == 0


def test_each_token_is_counted_once(data_parallel: Server) -> None:
    assert_counts_are_right(data_parallel)


def test_metrics_agree_with_the_status(data_parallel: Server) -> None:
    data_parallel.answers(prompts(per_domain=4, skip=8))
    assert_metrics_agree(data_parallel)


def test_load_of_the_experts_agrees_with_the_status(data_parallel: Server) -> None:
    status, load = data_parallel.status(), data_parallel.load()
    assert load["generation"] == status["generation"]
    assert len(load["layers"]) == status["layers"]
    for layer in load["layers"]:
        assert len(layer["slots"]) == len(layer["quotas"]) == status["slots"]
        for phase, tokens in status["phase_tokens"].items():
            assert sum(layer["tokens"][phase]) == tokens * int(status["info"]["top_k"])


def test_the_trace_replays_to_what_the_server_committed(
    data_parallel: Server, traces: Path, tmp_path: Path
) -> None:
    status = data_parallel.drive_until(lambda status: not status["migrating"])
    _switch_recording(data_parallel, "false")
    _switch_recording(data_parallel, "true")
    output = tmp_path / "replay.json"
    trace, *_ = sorted(traces.glob("*.eptrace"))
    options = ["--policy", "ours", "--format", "json", "--output", str(output), "--quiet"]
    result = CliRunner().invoke(app, ["replay", str(trace), *options])
    assert result.exit_code == 0, result.output
    commits = json.loads(output.read_text())["rows"][0]["commits"]
    known = [commit for commit in commits if commit["generation"] <= status["generation"]]
    assert [commit["generation"] for commit in known] == [*range(1, status["generation"] + 1)]
    moved = sum(commit["experts_moved"] for commit in known)
    assert moved == sum(status["migrated_experts"].values())
    recorded = {r.generation: r for r in TraceReader(trace) if isinstance(r, RecordedPlacement)}
    for commit in commits[:-1]:
        before, after = (recorded[commit["generation"] - back].placement for back in (1, 0))
        assert after.changed_slots(before) == commit["experts_moved"]


def test_recording_is_switched_by_those_who_may(data_parallel: Server, traces: Path) -> None:
    url = f"{data_parallel.url}/ep_rebalance/record"
    operator = {"authorization": f"Bearer {OPERATOR}"}
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": OPERATOR}):
        assert httpx.post(url, params={"on": "false"}, headers=headers).status_code == 401
    assert httpx.post(f"{url}?on=false&api_key={OPERATOR}").status_code == 401
    assert httpx.get(url, headers=operator).status_code == 405
    assert httpx.post(url, headers=operator).status_code == 400
    assert httpx.post(url, params={"on": "maybe"}, headers=operator).status_code == 400
    assert OPERATOR not in httpx.get(f"{data_parallel.url}/ep_rebalance/status").text
    before = len(list(traces.glob("*.eptrace")))
    _switch_recording(data_parallel, "false")
    size = _recorded_bytes(traces)
    data_parallel.answers(prompts(per_domain=4, skip=8))
    assert _recorded_bytes(traces) == size
    _switch_recording(data_parallel, "true")
    data_parallel.answers(prompts(per_domain=4, skip=8))
    time.sleep(1)
    assert len(list(traces.glob("*.eptrace"))) == before + 1
    assert OPERATOR.encode() not in b"".join(path.read_bytes() for path in traces.iterdir())


def _switch_recording(server: Server, on: str) -> None:
    headers = {"authorization": f"Bearer {OPERATOR}"}
    url = f"{server.url}/ep_rebalance/record"
    answer = httpx.post(url, params={"on": on}, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    time.sleep(0.5)


def _recorded_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_promtool_accepts_our_metrics(data_parallel: Server) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    ours = [
        line
        for line in data_parallel.metrics().splitlines()
        if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("ep_rebalance_")
    ]
    assert len(ours) > 50
    text = "\n".join(ours) + "\n"
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
