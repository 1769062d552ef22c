"""A server with one rank on each of three hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import MIGRATIONS, answers_across_migrations, assert_counts_are_right
from engines import V032
from hosts import GIGABIT, network, why_not
from serving import PLUGIN
from serving_on_hosts import OnHosts, serving_on

pytestmark = [*V032.marks, pytest.mark.hosts]

HOSTS = 3


@pytest.fixture(scope="module")
def three_nodes(logs: Path, settings_file: str, one_rank_answers: object) -> Iterator[OnHosts]:
    """Starts after the server of `one_rank_answers` has ended. 16 experts in 18 slots."""
    if reason := why_not():
        pytest.skip(reason)
    settings = (*PLUGIN, "--ep-rebalance-config", settings_file)
    settings += ("--ep-rebalance-config.planner.redundant_experts", "2")
    with (
        network(HOSTS, bits_per_second=GIGABIT) as joined,
        serving_on(joined.hosts, logs / "three_nodes.log", *settings, ranks=(1,) * HOSTS) as served,
    ):
        yield served


def test_on_three_hosts_answers_equal_one_rank_without_the_plugin(
    three_nodes: OnHosts, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    asked = answers_across_migrations(three_nodes.server, questions)
    for when, answers in asked.items():
        assert answers == one_rank_answers * (len(answers) // len(questions)), when
    status = three_nodes.server.status()
    assert status["ep_size"] == HOSTS
    assert status["plans"]["committed"] >= MIGRATIONS
    assert status["migrated_experts"]["internode"] >= MIGRATIONS
    assert status["migrated_experts"]["intranode"] == 0
    assert f"{HOSTS} ranks on {HOSTS} nodes exchange" in three_nodes.server.log_text()


def test_tokens_of_three_hosts_are_counted_once(three_nodes: OnHosts) -> None:
    assert_counts_are_right(three_nodes.server)
