"""Two data-parallel ranks with more slots than experts: the split over replicas follows the load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import DATA_PARALLEL, PLUGIN, Server, serving

pytestmark = pytest.mark.server

SPLITS = 4


@pytest.fixture(scope="module")
def replicated(
    logs: Path, settings_file: str, one_rank_answers: list[list[int]]
) -> Iterator[Server]:
    """Starts after the server of `one_rank_answers` has ended."""
    arguments = (
        *(*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file),
        *("--ep-rebalance-config.planner.policy", "none"),
        *("--ep-rebalance-config.planner.redundant_experts", "4"),
    )
    with serving(logs / "replicated.log", *arguments) as server:
        yield server


def quotas(server: Server) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(layer["quotas"]) for layer in server.load()["layers"])


def test_answers_are_equal_however_tokens_are_split(
    replicated: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    seen = {quotas(replicated)}

    def another_split(_: object) -> bool:
        seen.add(quotas(replicated))
        return len(seen) > SPLITS

    assert replicated.answers(questions) == one_rank_answers
    replicated.drive_until(another_split)
    assert replicated.answers(questions) == one_rank_answers
    assert replicated.status()["generation"] == 0
