"""Metrics, status and start-up errors of real servers."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DATA_PARALLEL, PLUGIN, TENSOR_PARALLEL
from prometheus_client.parser import text_string_to_metric_families
from serving import Server, prompts, refused_start, serving

pytestmark = pytest.mark.server


def samples(server: Server) -> dict[tuple[str, str], float]:
    """Our series: (name, own label) -> value."""
    found = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            if sample.name.startswith("ep_rebalance_"):
                assert sample.labels["model_name"] == "tiny_moe"
                own = [
                    v for k, v in sample.labels.items() if k not in ("model_name", "engine", "pid")
                ]
                found[sample.name, ",".join(own)] = sample.value
    return found


def assert_metrics_agree(server: Server) -> None:
    time.sleep(2)
    status, seen = server.status(), samples(server)
    assert seen["ep_rebalance_placement_generation", ""] == status["generation"]
    for outcome, count in status["plans"].items():
        assert seen["ep_rebalance_plans_total", outcome] == count
    for link, count in status["migrated_bytes"].items():
        assert seen["ep_rebalance_migrated_bytes_total", link] == count
    for phase, count in status["phase_tokens"].items():
        assert seen["ep_rebalance_phase_tokens_total", phase] == count
    for layer, ratio in enumerate(status["imbalance"]):
        assert seen["ep_rebalance_load_imbalance_ratio", str(layer)] == pytest.approx(ratio)
    stalls: dict[str, Any] = status["commit_stall_seconds"]
    total = stalls["first"] + len(stalls["values"])
    assert seen["ep_rebalance_commit_stall_seconds_count", ""] == total


def test_metrics_agree_with_the_status(data_parallel: Server) -> None:
    data_parallel.answers(prompts(per_domain=4, skip=8))
    assert_metrics_agree(data_parallel)


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


def test_two_api_servers_with_a_key(logs: Path, settings_file: str) -> None:
    """Each API server answers the route, one exports, and the route asks for the key."""
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    more = ("--api-server-count", "2", "--api-key", "secret")
    with serving(logs / "two_api_servers.log", *arguments, *more) as server:
        refused = httpx.get(f"{server.url}/ep_rebalance/status")
        assert refused.status_code == 401
        server.authorise("secret")
        server.answers(prompts(per_domain=2))
        for _ in range(4):
            assert server.status()["ep_size"] == 2
        assert_metrics_agree(server)


def test_four_ranks_of_tensor_and_data_parallelism_serve(
    logs: Path, settings_file: str, questions: list[str]
) -> None:
    arguments = (*TENSOR_PARALLEL, *DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    with serving(logs / "four_ranks.log", *arguments, ranks=4) as server:
        before = server.answers(questions[:8])
        server.drive_until(lambda s: s["generation"] >= 1)
        assert server.answers(questions[:8]) == before
        assert server.status()["ep_size"] == 4


def test_observe_counts_and_moves_nothing(logs: Path, settings_file: str) -> None:
    settings = ("--ep-rebalance-config", settings_file, "--ep-rebalance-config.mode", "observe")
    with serving(logs / "observe.log", *DATA_PARALLEL, *PLUGIN, *settings) as server:
        server.answers(prompts(per_domain=5))
        status = server.status()
    assert status["phase_tokens"]["decode"] > 500
    assert status["imbalance"] == status["contiguous_imbalance"]
    assert sum(status["plans"].values()) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.windw", "3"),
            "unknown configuration key 'windw'",
        ),
        (("--plugin", "ep_rebalance"), "there are none"),
        (PLUGIN, "one expert-parallel rank"),
        (
            (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.planner.redundant_experts", "3"),
            "do not divide by 2 ranks",
        ),
        (
            (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.state.path", "README.md"),
            "no readable state file",
        ),
    ],
)
def test_bad_input_stops_the_server_at_start(
    tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "README.md").write_text("not a state file")
    code, output = refused_start(tmp_path, *arguments)
    assert code != 0
    assert reason in output
    assert "Remedy:" in output
