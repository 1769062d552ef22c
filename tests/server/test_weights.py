"""The engine's weights are replaced by the ways that vLLM has on CPU, beside a drafter with experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cpu_server import START_SECONDS, cpu_environment
from engines import FILE_TRANSFER, PREPACKED_RELOADS, V032
from offline_weights import TOKENS
from serving import TINY_MOE

pytestmark = V032.marks

SCRIPT = Path(__file__).with_name("offline_weights.py")


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory,
    questions: list[str],
    one_rank_answers: list[list[int]],
) -> dict[str, Any]:
    """Starts after the server of `one_rank_answers` has ended."""
    folder = tmp_path_factory.mktemp("weights")
    asked = folder / "questions.json"
    asked.write_text(json.dumps(questions))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(TINY_MOE), str(folder), str(asked)],
        env={
            **os.environ,
            **cpu_environment(2),
            **V032.environment([FILE_TRANSFER, PREPACKED_RELOADS]),
        },
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    *_, line = (line for line in done.stdout.splitlines() if line.startswith("{"))
    answers: dict[str, Any] = json.loads(line)
    return answers


def test_with_a_drafter_answers_are_those_without(
    told: dict[str, Any], one_rank_answers: list[list[int]]
) -> None:
    expected = [answer[:TOKENS] for answer in one_rank_answers]
    assert told["original"] == told["original, moved"] == expected


def test_with_a_drafter_only_the_targets_tokens_are_counted(told: dict[str, Any]) -> None:
    """The drafter sees every token of a prompt too."""
    assert told["prefill"]["counted"] == told["prefill"]["there"]


def test_each_row_of_the_drafter_is_counted_once(
    told: dict[str, Any], questions: list[str]
) -> None:
    """The first pass has a row more than the target for each request, the second one row for each."""
    target, drafter = (one["phase_tokens"] for one in (told["drafted"], told["drafted"]["drafter"]))
    requests = 2 * (len(questions) + 1)
    assert drafter["prefill"] == target["prefill"] + requests
    steps, rest = divmod(target["decode"], 3)  # of a request: a token and two drafts
    assert rest == 0
    assert drafter["decode"] == target["decode"] + 2 * steps + requests


def test_every_draft_is_accepted_before_and_after_experts_of_both_have_moved(
    told: dict[str, Any],
) -> None:
    """The drafter is the same model."""
    moved = told["spread"]
    assert sum(moved["migrated_experts"].values()) > 0
    assert sum(moved["drafter"]["migrated_experts"].values()) > 0
    assert told["accepted, moved"] == told["accepted"]
    assert told["accepted"]["accepted_tokens"] > 0


def test_new_weights_of_the_target_leave_the_drafters_experts_where_they_are(
    told: dict[str, Any],
) -> None:
    drafters = [told[when]["drafter"] for when in ("spread", "after update", "after reload")]
    assert [drafter["weight_reloads"] for drafter in drafters] == [0, 0, 0]
    generations = [drafter["generation"] for drafter in drafters]
    assert generations == sorted(generations)


def test_the_weights_of_the_test_give_other_answers(told: dict[str, Any]) -> None:
    variants = ("original, unmoved", "experts, unmoved", "norm, unmoved")
    assert len({str(told[variant]) for variant in variants}) == len(variants)
    assert told["original, unmoved"] == told["original"] == told["original, updated"]


def test_an_update_amid_a_migration_gives_the_answers_of_the_new_weights(
    told: dict[str, Any],
) -> None:
    assert told["experts, updated amid a migration"] == told["experts, unmoved"]
    before, after = told["before update"], told["after update"]
    assert after["plans"]["abandoned"] == before["plans"]["abandoned"] + 1
    assert after["generation"] > before["generation"]
    assert after["weight_reloads"] > before["weight_reloads"]


def test_an_update_without_experts_leaves_them_where_they_are(told: dict[str, Any]) -> None:
    assert told["norm, the only tensor updated"] == told["norm, unmoved"]
    before, after = told["before part"], told["after part"]
    assert sum(before["migrated_experts"].values()) > 0
    assert after["generation"] == before["generation"]
    assert after["weight_reloads"] == before["weight_reloads"]


def test_a_reload_amid_a_migration_gives_the_answers_of_the_checkpoint(
    told: dict[str, Any],
) -> None:
    assert told["original, reloaded amid a migration"] == told["original"]
    before, after = told["before reload"], told["after reload"]
    assert after["generation"] > before["generation"]
    assert after["weight_reloads"] == before["weight_reloads"] + 1
    assert after["plans"]["abandoned"] > before["plans"]["abandoned"]
    assert after["plans"]["failed"] == 0
