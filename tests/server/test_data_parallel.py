"""Two data-parallel ranks: one server for all tests here, since idle vLLM workers keep a core busy."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from answers import MIGRATIONS, answers_across_migrations, assert_counts_are_right
from metrics_page import assert_metrics_agree
from serving import Server, prompts

pytestmark = pytest.mark.server


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
