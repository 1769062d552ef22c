"""Mode observe, with the experts computed by our grouped MLP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OneRank
from engines import V033_V1
from serving import DATA_PARALLEL, PLUGIN, Server, prompts, serving

pytestmark = V033_V1.marks


@pytest.fixture(scope="module")
def observe(logs: Path, settings_file: str, one_rank: OneRank) -> Iterator[Server]:
    """Starts after the server of `one_rank` has ended."""
    plane = {"data_plane": {"experts": "triton", "group_by_node": True}}
    arguments = (
        *(*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file),
        *("--ep-rebalance-config", json.dumps(plane), "--ep-rebalance-config.mode", "observe"),
    )
    with serving(logs / "observe.log", *arguments, engine=V033_V1) as server:
        yield server


def test_observe_counts_and_moves_nothing(observe: Server) -> None:
    observe.answers(prompts(per_domain=5))
    status = observe.status()
    assert status["phase_tokens"]["decode"] > 500
    assert status["imbalance"] == status["contiguous_imbalance"]
    assert sum(status["plans"].values()) == 0


def test_grouped_experts_differ_from_the_engines_by_rounding_only(
    observe: Server, questions: list[str], one_rank: OneRank
) -> None:
    assert "GroupedExperts" in observe.log_text()
    differences = [
        abs(own[token] - other[token])
        for ours, theirs in zip(
            observe.log_probabilities(questions, tokens=1), one_rank.log_probabilities, strict=True
        )
        for own, other in zip(ours[:1], theirs[:1], strict=True)
        for token in own.keys() & other.keys()
    ]
    assert len(differences) >= len(questions)
    assert max(differences) < 1e-4
