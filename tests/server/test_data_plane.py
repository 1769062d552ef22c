"""Our all-to-all in its other shape, and our experts, in real servers: answers are those of one rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answers import answers_across_migrations
from conftest import OneRank
from serving import DATA_PARALLEL, PLUGIN, Server, serving

pytestmark = pytest.mark.server


def serve(log: Path, settings_file: str, plane: dict[str, Any]) -> Any:
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    more = ("--ep-rebalance-config", json.dumps({"data_plane": plane}))
    return serving(log, *arguments, *more)


@pytest.fixture(scope="module")
def fixed_capacity(logs: Path, settings_file: str) -> Iterator[Server]:
    """So little room that most steps take several rounds."""
    plane = {"all_to_all": "ours", "shape": "fixed", "capacity_factor": 0.4}
    with serve(logs / "fixed_capacity.log", settings_file, plane) as server:
        yield server


@pytest.fixture(scope="module")
def grouped_experts(logs: Path, settings_file: str) -> Iterator[Server]:
    plane = {"experts": "triton", "group_by_node": True}
    with serve(logs / "grouped_experts.log", settings_file, plane) as server:
        yield server


def test_fixed_capacity_gives_the_answers_of_one_rank(
    fixed_capacity: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    asked = answers_across_migrations(fixed_capacity, questions)
    for when, answers in asked.items():
        assert answers == one_rank_answers * (len(answers) // len(questions)), when


def test_grouped_experts_differ_from_the_engines_by_rounding_only(
    grouped_experts: Server, questions: list[str], one_rank: OneRank
) -> None:
    assert "GroupedExperts" in grouped_experts.log_text()
    differences = [
        abs(own[token] - other[token])
        for ours, theirs in zip(
            grouped_experts.log_probabilities(questions), one_rank.log_probabilities, strict=True
        )
        for own, other in zip(ours[:1], theirs[:1], strict=True)
        for token in own.keys() & other.keys()
    ]
    assert len(differences) >= len(questions)
    assert max(differences) < 1e-4
