"""Two tensor-parallel ranks."""

from __future__ import annotations

import pytest
from answers import answers_across_migrations, assert_counts_are_right
from serving import Server

pytestmark = pytest.mark.server


def test_tensor_parallel_answers_do_not_change(
    tensor_parallel: Server, questions: list[str]
) -> None:
    asked = answers_across_migrations(tensor_parallel, questions)
    assert asked["during"] == asked["before"] * (len(asked["during"]) // len(questions))
    assert asked["after"] == asked["before"]


def test_tensor_parallel_ranks_count_each_token_once(tensor_parallel: Server) -> None:
    assert_counts_are_right(tensor_parallel)
