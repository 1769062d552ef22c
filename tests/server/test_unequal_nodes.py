"""A server with two ranks on one host and one on another: who has an expert near, fetches it from there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from answers import answers_across_migrations
from engines import V032
from hosts import Network
from serving import PLUGIN
from serving_on_hosts import OnHosts, serving_on

from ep_rebalance.load.trace import RecordedPlacement, TraceReader
from ep_rebalance.placement import Placement

pytestmark = [*V032.marks, pytest.mark.hosts]

RANKS = (2, 1)
NODE_OF_RANK = (0, 0, 1)


@pytest.fixture(scope="module")
def recorded(logs: Path) -> Path:
    """Where the server records its load."""
    folder = logs / "three_ranks"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def three_ranks(
    two_hosts: Network, logs: Path, recorded: Path, settings_file: str, one_rank_answers: object
) -> Iterator[OnHosts]:
    """Two on the first host, one on the second, and two slots more than experts: some have replicas."""
    more = {"planner": {"redundant_experts": 2}, "trace": {"path": str(recorded)}}
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
    three_ranks: OnHosts, recorded: Path
) -> None:
    server = three_ranks.server
    status = server.drive_until(
        lambda s: (
            min(s["migrated_experts"]["intranode"], s["migrated_experts"]["internode"]) > 0
            and not s["migrating"]
        )
    )
    (file,) = recorded.glob("*.eptrace")
    trace = TraceReader(file)
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
