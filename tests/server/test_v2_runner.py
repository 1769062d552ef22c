"""vLLM 0.33 with its V2 model runner, as users have it: batches are padded as for CUDA graphs, tokens
reach the experts on vLLM's own paths, and some experts have replicas. Two tensor-parallel ranks hold
every token each and add up what they computed; two data-parallel ranks gather and scatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from answers import answers_across_migrations, assert_counts_are_right, reload_amid_a_migration
from conftest import OneRank
from engines import GPU_TOKEN_PATHS, PREPACKED_RELOADS, V033_V2
from metrics_page import assert_metrics_agree, samples
from serving import DATA_PARALLEL, OPERATOR, PLUGIN, TENSOR_PARALLEL, Server, prompts, serving

pytestmark = V033_V2.marks

TOKENS = 12
"""Of each answer: Triton's interpreter makes steps long."""
SETTINGS = {
    "window": {"snapshot_steps": 4, "snapshots": 12, "min_snapshots": 10},
    # Two times the snapshots that all questions take when they are asked at once.
    "planner": {"interval_snapshots": 10, "redundant_experts": 4},
    "decision": {"min_gain": 0.0, "min_gain_over_cost": 0.0},
    "migration": {"max_bytes_per_step": 32 << 10},  # several steps for each expert
    "data_plane": {"all_to_all": "engine"},
    "metrics": {"poll_seconds": 0.5},
}


LAYOUTS = {"tensor_parallel": TENSOR_PARALLEL, "data_parallel": DATA_PARALLEL}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def v2_runner(logs: Path, layout: str, operators_key: str, one_rank: OneRank) -> Iterator[Server]:
    path = logs / f"v2_{layout}.yaml"
    settings = {
        **SETTINGS,
        "control": {"enabled": True, "api_key_file": operators_key},
    }
    path.write_text(yaml.safe_dump(settings))
    with serving(
        logs / f"v2_runner-{layout}.log",
        *(*LAYOUTS[layout], *PLUGIN, "--ep-rebalance-config", str(path)),
        engine=V033_V2,
        plugins=[GPU_TOKEN_PATHS, PREPACKED_RELOADS],
        tokens=TOKENS,
        VLLM_SERVER_DEV_MODE="1",
    ) as server:
        yield server


def test_answers_are_those_of_one_rank_without_replicas(
    v2_runner: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    assert "Using V2 Model Runner" in v2_runner.log_text()
    expected = [answer[:TOKENS] for answer in one_rank_answers]
    asked = answers_across_migrations(v2_runner, questions)
    for when, answers in asked.items():
        assert answers == expected * (len(answers) // len(questions)), when
    status = v2_runner.status()
    assert sum(status["migrated_experts"].values()) >= status["generation"] >= 3
    assert status["plans"]["abandoned"] == status["plans"]["failed"] == 0


def test_each_token_is_counted_once_and_padding_never(v2_runner: Server) -> None:
    """Asked one after the other: one data-parallel rank is idle, and a decode step has 1 row of 8."""
    assert_counts_are_right(v2_runner)
    load = v2_runner.load()
    for layer in load["layers"]:
        for phase, tokens in v2_runner.status()["phase_tokens"].items():
            assert sum(layer["tokens"][phase]) == tokens * int(v2_runner.status()["info"]["top_k"])


def test_metrics_agree_with_the_status(v2_runner: Server) -> None:
    v2_runner.answers(prompts(per_domain=2, skip=8))
    assert_metrics_agree(v2_runner)


def test_paused_nothing_moves_and_resumed_it_does(v2_runner: Server) -> None:
    assert change(v2_runner, "pause") == 200
    # The snapshot that is under way may still begin a plan, which the next one then gives up.
    v2_runner.answers(prompts(per_domain=4, skip=8))
    before = v2_runner.drive_until(lambda s: s["paused"] and s["activity"] == "watching")
    for _ in range(3):
        v2_runner.answers(prompts(per_domain=4, skip=8))
    after = v2_runner.status()
    assert (after["generation"], after["plans"]) == (before["generation"], before["plans"])
    assert samples(v2_runner)["ep_rebalance_paused", ""] == 1
    assert change(v2_runner, "resume") == 200
    assert change(v2_runner, "rebalance") == 200
    plans = sum(after["plans"].values())
    v2_runner.drive_until(lambda s: not s["paused"] and sum(s["plans"].values()) > plans)


def test_answers_after_a_reload_amid_a_migration_are_those_of_a_fresh_server(
    v2_runner: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    reload_amid_a_migration(v2_runner)
    expected = [answer[:TOKENS] for answer in one_rank_answers]
    assert v2_runner.answers(questions, concurrency=len(questions)) == expected


def change(server: Server, path: str) -> int:
    headers = {"authorization": f"Bearer {OPERATOR}"}
    return httpx.post(f"{server.url}/ep_rebalance/{path}", headers=headers, timeout=60).status_code
