"""A server with one rank on each of two hosts, 1 Gbit/s between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from answers import MIGRATIONS, answers_across_migrations, assert_counts_are_right
from engines import V032
from hosts import GIGABIT, Network
from metrics_page import assert_metrics_agree, samples
from serving import PLUGIN, SETTINGS, prompts
from serving_on_hosts import OnHosts, serving_on

pytestmark = [*V032.marks, pytest.mark.hosts]


@pytest.fixture(scope="module")
def two_nodes(
    two_hosts: Network, logs: Path, settings_file: str, one_rank_answers: object
) -> Iterator[OnHosts]:
    """Starts after the server of `one_rank_answers` has ended. The second host has other settings."""
    other = logs / "other.yaml"
    other.write_text(yaml.safe_dump(SETTINGS | {"window": {"snapshot_steps": 11}}))
    settings, others = (
        (*PLUGIN, "--ep-rebalance-config", str(file)) for file in (settings_file, other)
    )
    with serving_on(two_hosts.hosts, logs / "two_nodes.log", *settings, elsewhere=others) as served:
        yield served


def test_a_server_measures_the_links_between_its_hosts(two_nodes: OnHosts) -> None:
    links = two_nodes.server.status()["links"]
    assert set(links) == {"internode", "round_seconds"}
    # At most what the cable carries; less where others use the cores that have to fill it.
    assert 0.15 * GIGABIT / 8 < links["internode"] < 1.3 * GIGABIT / 8
    assert "2 ranks on 2 nodes exchange" in two_nodes.server.log_text()


def test_over_a_slow_link_answers_equal_one_rank_without_the_plugin(
    two_nodes: OnHosts, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    asked = answers_across_migrations(two_nodes.server, questions)
    for when, answers in asked.items():
        assert answers == one_rank_answers * (len(answers) // len(questions)), when
    status = two_nodes.server.status()
    assert status["plans"]["committed"] >= MIGRATIONS
    assert status["plans"]["abandoned"] == status["plans"]["failed"] == 0
    assert status["migrated_experts"]["internode"] >= MIGRATIONS
    assert status["migrated_experts"]["intranode"] == 0


def test_tokens_of_both_hosts_are_counted_once(two_nodes: OnHosts) -> None:
    assert_counts_are_right(two_nodes.server)


def test_one_status_and_one_page_of_metrics_are_of_both_hosts(two_nodes: OnHosts) -> None:
    server = two_nodes.server
    server.answers(prompts(per_domain=4, skip=8))
    assert_metrics_agree(server)
    status = server.status()
    assert status["ep_size"] == len(status["rank_tokens"]) == 2
    assert min(status["rank_tokens"]) > 0
    seen = [rank for name, rank in samples(server) if name == "ep_rebalance_rank_tokens_total"]
    assert sorted(seen) == ["0", "1"]


def test_the_settings_of_the_first_host_hold_for_the_second(two_nodes: OnHosts) -> None:
    assert two_nodes.server.status()["config"]["window"]["snapshot_steps"] == 4
    told = "EP rank 1 was started with window.snapshot_steps=11; rank 0's 4 holds for all"
    assert told in two_nodes.server.log_text()
