"""What a scenario takes from the trace's head and what from the settings."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from traces import head_of, write_trace

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import TraceError, TraceHead, TraceReader
from ep_rebalance.offline.scenarios import scenario
from ep_rebalance.topology import Topology

HEAD = head_of(layers=3, experts=32, ranks=4, redundant=4)
MEASURED = msgspec.structs.replace(HEAD, bytes_per_second=[9e11, 3e11, 4e10], round_seconds=2e-5)


def topology_of(head: TraceHead, ranks: int = 4, **sections: object) -> Topology:
    settings = load_config({"planner": {"redundant_experts": 4}}, sections)
    return scenario(head, settings, "ours", ranks, 4).topology


def test_links_are_those_that_the_recorded_server_measured() -> None:
    for ranks in (4, 2):
        topology = topology_of(MEASURED, ranks)
        assert topology.bytes_per_second == (9e11, 3e11, 4e10)
        assert topology.round_seconds == 2e-5


def test_links_of_a_trace_without_them_are_the_usual_ones() -> None:
    usual = Topology.single_node(4)
    topology = topology_of(HEAD)
    assert topology.bytes_per_second == usual.bytes_per_second
    assert topology.round_seconds == usual.round_seconds


def test_configured_links_take_the_place_of_measured_ones() -> None:
    links = {"internode_bytes_per_second": 1e9, "round_seconds": 0.0}
    topology = topology_of(MEASURED, links=links)
    assert topology.bytes_per_second == (9e11, 3e11, 1e9)
    assert topology.round_seconds == 0.0


def test_links_survive_a_trace(tmp_path: Path) -> None:
    head = TraceReader(write_trace(tmp_path, MEASURED, 1)).head
    assert (head.bytes_per_second, head.round_seconds) == ([9e11, 3e11, 4e10], 2e-5)


@pytest.mark.parametrize(
    "links",
    [
        {"bytes_per_second": [1.0, 2.0]},
        {"bytes_per_second": [1.0, 2.0, 0.0]},
        {"bytes_per_second": [1.0, 2.0, 3.0], "round_seconds": -1.0},
    ],
)
def test_links_that_cannot_be_are_refused(tmp_path: Path, links: dict[str, object]) -> None:
    path = write_trace(tmp_path, msgspec.structs.replace(HEAD, **links), 1)
    with pytest.raises(TraceError, match="cannot be"):
        TraceReader(path)
