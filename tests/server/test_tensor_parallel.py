"""Two tensor-parallel ranks, some experts with replicas."""

from __future__ import annotations

import math

from answers import answers_across_migrations, assert_counts_are_right
from conftest import OneRank
from engines import V032
from serving import Server

pytestmark = V032.marks

LARGEST_DIFFERENCE = 1e-4
"""Of log-probabilities between two tensor-parallel ranks and one: attention's output projection and
the embedding are summed over ranks, in another order than on one rank. The experts' outputs are
not: `combine: exact` keeps their order."""


def test_tensor_parallel_answers_do_not_change(
    tensor_parallel: Server, questions: list[str]
) -> None:
    asked = answers_across_migrations(tensor_parallel, questions)
    assert asked["during"] == asked["before"] * (len(asked["during"]) // len(questions))
    assert asked["after"] == asked["before"]


def test_tensor_parallel_ranks_count_each_token_once(tensor_parallel: Server) -> None:
    assert_counts_are_right(tensor_parallel)


def test_tensor_parallel_differs_from_one_rank_by_rounding_only(
    tensor_parallel: Server, one_rank: OneRank, questions: list[str]
) -> None:
    """Compared token by token until an answer takes another turn, which only a near tie allows."""
    differences = []
    for ours, theirs in zip(
        tensor_parallel.log_probabilities(questions), one_rank.log_probabilities, strict=True
    ):
        for own_top, other_top in zip(ours, theirs, strict=True):
            shared = own_top.keys() & other_top.keys()
            differences += [abs(own_top[token] - other_top[token]) for token in shared]
            chosen, other = max(own_top, key=own_top.get), max(other_top, key=other_top.get)
            if chosen != other:
                tie = other_top.get(other, math.inf) - other_top.get(chosen, -math.inf)
                assert tie <= 2 * LARGEST_DIFFERENCE
                break
    assert len(differences) > 1000
    assert max(differences) <= LARGEST_DIFFERENCE
