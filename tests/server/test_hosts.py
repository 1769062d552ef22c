"""Ranks on two hosts, each with network and shared memory of its own, 1 Gbit/s between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from answers import MIGRATIONS, answers_across_migrations, assert_counts_are_right
from engines import V032
from hosts import Host, Network, network, why_not
from metrics_page import assert_metrics_agree, samples
from serving import PLUGIN, SETTINGS, prompts
from serving_on_hosts import OnHosts, serving_on, start_on

from ep_rebalance.load.trace import RecordedPlacement, TraceReader
from ep_rebalance.placement import Placement

pytestmark = [*V032.marks, pytest.mark.hosts]

GIGABIT = 10**9
TENTH = GIGABIT // 10
TAKING_TURNS = 2
"""gloo sends to a rank and receives from it in turn: two ranks that send to each other have half of what a
cable carries each way. In a ring of three they have all of it.
"""
TOLERANCE = 0.3
MEASURE = [sys.executable, "-P", str(Path(__file__).with_name("rank_on_host.py"))]
TRAFFIC = [sys.executable, str(Path(__file__).with_name("traffic_between_hosts.py"))]
OBSERVE = ("--ep-rebalance-config.mode", "observe")
LIMIT = 15.0
EVERY_GAIN_COUNTS = {
    "planner": {**SETTINGS["planner"], "internode_token_price": 0.0},
    "decision": {**SETTINGS["decision"], "horizon_steps": 1_000_000},
}
"""Between hosts a move is dear: after two of them the planner found none that pays for itself."""
RANKS = (2, 1)
NODE_OF_RANK = (0, 0, 1)


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network(2, bits_per_second=GIGABIT) as joined:
        yield joined


@pytest.fixture
def listening(two_hosts: Network) -> Iterator[Host]:
    """The second host, which takes and sends back what the first one sends."""
    _, second = two_hosts.hosts
    command = [*second.enter, *TRAFFIC, "listen"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield second
        process.kill()


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
    settings += ("--ep-rebalance-config", json.dumps(EVERY_GAIN_COUNTS))
    with serving_on(two_hosts.hosts, logs / "two_nodes.log", *settings, elsewhere=others) as served:
        yield served


def test_a_link_has_the_bandwidth_and_the_losses_that_were_asked_for(
    two_hosts: Network, listening: Host
) -> None:
    first = two_hosts.hosts[0]
    two_hosts.limit(GIGABIT // 10)
    assert float(first.run(*TRAFFIC, "stream", listening.address, "4")) == pytest.approx(
        GIGABIT // 10, rel=0.15
    )
    two_hosts.limit(GIGABIT)
    for share, least, most in ((0.05, 1700, 1900), (1.0, 0, 0), (0.0, 2000, 2000)):
        two_hosts.lose(listening, share)  # there and back
        assert least <= int(first.run(*TRAFFIC, "datagrams", listening.address, "2000")) <= most


@pytest.mark.parametrize(("ranks", "expected"), [(2, TENTH / 8 / TAKING_TURNS), (3, TENTH / 8)])
def test_links_are_measured_as_fast_as_they_are(ranks: int, expected: float) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with network(ranks, bits_per_second=TENTH) as joined, ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*host.enter, *MEASURE, str(rank), str(ranks), joined.hosts[0].address],
                    env={**os.environ, **V032.environment(), **host.environment},
                    stdout=subprocess.PIPE,
                )
            )
            for rank, host in enumerate(joined.hosts)
        ]
        (measured,) = {float(process.communicate(timeout=120)[0]) for process in processes}
    assert measured == pytest.approx(expected, rel=TOLERANCE)


def test_a_server_measures_the_links_between_its_hosts(two_nodes: OnHosts) -> None:
    links = two_nodes.server.status()["links"]
    assert set(links) == {"internode", "round_seconds"}
    # At most what the cable carries; less where others use the cores that have to fill it.
    assert 0.3 * GIGABIT / 8 / TAKING_TURNS < links["internode"] < 1.3 * GIGABIT / 8
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


@pytest.fixture(scope="module")
def three_ranks(
    two_hosts: Network, logs: Path, settings_file: str, one_rank_answers: object
) -> Iterator[OnHosts]:
    """Two on the first host, one on the second, and two slots more than experts: some have replicas."""
    more = {
        "planner": {"redundant_experts": 2},
        "trace": {"path": str(logs / "three_ranks.eptrace")},
    }
    settings = (*PLUGIN, "--ep-rebalance-config", settings_file)
    settings += ("--ep-rebalance-config", json.dumps(more))
    with serving_on(two_hosts.hosts, logs / "three_ranks.log", *settings, ranks=RANKS) as served:
        yield served


def test_three_ranks_on_two_hosts_answer_as_one_rank_without_the_plugin(
    three_ranks: OnHosts, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    asked = answers_across_migrations(three_ranks.server, questions)
    for when, answers in asked.items():
        assert answers == one_rank_answers * (len(answers) // len(questions)), when


def test_experts_are_fetched_from_the_own_host_where_it_has_them(
    three_ranks: OnHosts, logs: Path
) -> None:
    server = three_ranks.server
    status = server.drive_until(
        lambda s: (
            min(s["migrated_experts"]["intranode"], s["migrated_experts"]["internode"]) > 0
            and not s["migrating"]
        )
    )
    trace = TraceReader(logs / "three_ranks.eptrace")
    assert tuple(trace.head.node_of_rank) == NODE_OF_RANK
    placements = [
        record.placement
        for record in trace
        if isinstance(record, RecordedPlacement) and record.generation <= status["generation"]
    ]
    assert len(placements) == status["generation"] + 1
    nearest: Counter[str] = Counter({"local": 0, "intranode": 0, "internode": 0})
    for before, after in pairwise(placements):
        nearest.update(nearest_links(before, after))
    assert nearest == status["migrated_experts"]


def nearest_links(before: Placement, after: Placement) -> Iterator[str]:
    """The kind of the shortest link to a replica, for each slot that changes."""
    per_rank = before.num_slots // before.num_ranks
    for old_P, new_P in zip(before.slots_LP.tolist(), after.slots_LP.tolist(), strict=True):
        for slot, (old, new) in enumerate(zip(old_P, new_P, strict=True)):
            if old == new:
                continue
            to = slot // per_rank
            ranks = {at // per_rank for at, expert in enumerate(old_P) if expert == new}
            if to in ranks:
                yield "local"
            elif any(NODE_OF_RANK[rank] == NODE_OF_RANK[to] for rank in ranks):
                yield "intranode"
            else:
                yield "internode"


def test_a_host_without_the_plugin_is_named(two_hosts: Network, tmp_path: Path) -> None:
    """In mode observe, where the configurations of the engines do not differ."""
    settings = (*PLUGIN, *OBSERVE, "--ep-rebalance-config.attach.timeout_seconds", f"{LIMIT:g}")
    processes, (log, _) = start_on(
        two_hosts.hosts,
        tmp_path / "named.log",
        *settings,
        elsewhere=("--enable-expert-parallel",),
    )
    try:
        assert processes[0].wait() != 0
    finally:
        for process in processes:
            process.stop()
    assert f"EP rank 1 of 2 did not attach within {LIMIT:g} s" in log.read_text(errors="replace")
