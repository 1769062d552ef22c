from __future__ import annotations

import pytest

from ep_rebalance.topology import Topology


def test_links() -> None:
    topology = Topology(node_of_rank=(0, 0, 1))
    assert topology.num_ranks == 3
    assert topology.link(1, 1) == "local"
    assert topology.link(0, 1) == "intranode"
    assert topology.link(1, 2) == "internode"


@pytest.mark.parametrize(
    ("node_of_rank", "links"),
    [
        ((0,), ()),
        ((0, 0), ("intranode",)),
        ((0, 1), ("internode",)),
        ((0, 0, 1), ("intranode", "internode")),
    ],
)
def test_links_that_there_are(node_of_rank, links) -> None:
    assert Topology(node_of_rank=node_of_rank).links_between_ranks == links


def test_seconds_follow_the_bandwidth_of_the_link() -> None:
    topology = Topology(node_of_rank=(0, 1), bytes_per_second=(100.0, 10.0, 1.0))
    assert topology.seconds(50, "local") == 0.5
    assert topology.seconds(50, "intranode") == 5.0
    assert topology.seconds(50, "internode") == 50.0


@pytest.mark.parametrize(
    ("node_of_rank", "price"), [((0, 0), 10.0), ((0, 0, 1), 10.0), ((0, 1, 2), 1.0)]
)
def test_the_fastest_link_that_there_is_has_a_price_of_one(node_of_rank, price) -> None:
    topology = Topology(node_of_rank=node_of_rank, bytes_per_second=(100.0, 10.0, 1.0))
    assert topology.internode_price == price


def test_what_is_no_topology_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        Topology(node_of_rank=())
    with pytest.raises(ValueError, match="positive"):
        Topology(node_of_rank=(0,), bytes_per_second=(1.0, 0.0, 1.0))


def test_ranks_fill_one_node_after_the_other():
    assert Topology.node_by_node(5, 2).node_of_rank == (0, 0, 1, 1, 2)
    with pytest.raises(ValueError, match="1 or more, not 0"):
        Topology.node_by_node(5, 0)
