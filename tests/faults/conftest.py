"""The campaign: one scene for each layout of ranks, with a history that is checked after every fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scene import QUESTIONS, TOKENS, Scenes
from serving import serving


@pytest.fixture(scope="session")
def right_answers(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Of one rank without the plugin, for QUESTIONS."""
    log = tmp_path_factory.mktemp("reference") / "one_rank.log"
    with serving(log, ranks=1, tokens=TOKENS) as server:
        return server.answers(QUESTIONS)


@pytest.fixture(scope="session")
def scenes(
    tmp_path_factory: pytest.TempPathFactory, right_answers: list[list[int]]
) -> Iterator[Scenes]:
    made = Scenes(tmp_path_factory.mktemp("scenes"), right_answers)
    yield made
    made.close()
