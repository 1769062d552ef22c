"""Links are measured by timed exchanges, equally on all ranks; what is configured is not measured."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.collectives import link_speed
from ep_rebalance.collectives.link_speed import LONGEST_SECONDS, SIZES, ring, with_measured_links
from ep_rebalance.config import LinksConfig
from ep_rebalance.topology import Topology

TWO_NODES = Topology(node_of_rank=(0, 0, 1, 1))
FIGURES = {
    "intranode_bytes_per_second": 3e9,
    "internode_bytes_per_second": 2e9,
    "round_seconds": 0.5,
}


def sent_by(topology: Topology, link: str) -> tuple[int, ...]:
    return ring(topology, link).to_R


def test_ranks_send_to_the_next_of_their_node_or_to_their_like_in_the_next_node():
    assert sent_by(TWO_NODES, "intranode") == (1, 0, 3, 2)
    assert sent_by(TWO_NODES, "internode") == (2, 3, 0, 1)
    assert sent_by(Topology.single_node(3), "intranode") == (1, 2, 0)


def test_where_nodes_differ_some_ranks_have_no_peer():
    uneven = Topology(node_of_rank=(0, 0, 1))
    assert sent_by(uneven, "intranode") == (1, 0, -1)
    assert sent_by(uneven, "internode") == (2, -1, 0)
    assert sent_by(Topology(node_of_rank=(1, 1)), "internode") == (-1, -1)


def test_there_is_no_ring_without_such_links():
    assert not ring(Topology.single_node(4), "internode")
    assert not ring(Topology(node_of_rank=(0, 1)), "intranode")
    assert not ring(Topology.single_node(1), "intranode")


def test_what_a_rank_sends_is_what_its_peer_receives():
    peers = ring(Topology(node_of_rank=(0, 0, 1)), "internode")
    splits = [peers.splits(rank, 7) for rank in range(3)]
    assert [sent for sent, _ in splits] == [[0, 0, 7], [0, 0, 0], [7, 0, 0]]
    assert [received for _, received in splits] == [[0, 0, 7], [0, 0, 0], [7, 0, 0]]


def measure(rank, topology, links=None):
    found = with_measured_links(
        topology,
        LinksConfig.model_validate(links or {}),
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    return found.bytes_per_second, found.round_seconds


@pytest.mark.parametrize(
    "topology", [TWO_NODES, Topology.single_node(4), Topology(node_of_rank=(0, 0, 0, 1))]
)
def test_all_ranks_have_the_same_finite_figures(four_ranks: Ranks, topology):
    answers = four_ranks.run(measure, topology)
    assert answers == [answers[0]] * 4
    (local, near, far), round_seconds = answers[0]
    assert local == topology.bytes_per_second[0]
    assert 1e6 < near < 1e12
    assert near != topology.bytes_per_second[1]
    assert (far == topology.bytes_per_second[2]) is (topology.num_nodes == 1)
    assert 0.0 < round_seconds < 1.0


def test_configured_figures_are_taken_as_they_are(four_ranks: Ranks):
    for (_, near, far), round_seconds in four_ranks.run(measure, TWO_NODES, FIGURES):
        assert (near, far, round_seconds) == (3e9, 2e9, 0.5)
    some = {"internode_bytes_per_second": 2e9}
    for (_, near, far), _ in four_ranks.run(measure, TWO_NODES, some):
        assert far == 2e9
        assert near != TWO_NODES.bytes_per_second[1]


def count_exchanges(rank, seconds_per_byte):
    """Bytes of each exchange over links on which a rank needs this long, and what was found."""
    sizes = []

    def exchange(received, sent, *splits, group):
        sizes.append(sent.numel())
        time.sleep(sent.numel() * seconds_per_byte if rank else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link_speed.dist, "all_to_all_single", exchange)
        (_, near, _), _ = measure(rank, Topology.single_node(2))
    return sizes, near


def test_slow_links_are_given_little_to_carry(two_ranks: Ranks):
    """One rank alone is slow; its speed is what counts."""
    bytes_per_second = SIZES[1] / LONGEST_SECONDS / 2
    for sizes, near in two_ranks.run(count_exchanges, 1 / bytes_per_second):
        assert max(sizes) == SIZES[0]
        assert near == pytest.approx(bytes_per_second, rel=0.5)


def test_a_group_of_one_keeps_its_figures(ranks_of: dict[int, Ranks]):
    topology = Topology.single_node(1)
    assert ranks_of[1].run(measure, topology) == [
        (topology.bytes_per_second, topology.round_seconds)
    ]
