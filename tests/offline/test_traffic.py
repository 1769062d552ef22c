"""Which pairs stay at home, and what the others cost in the modelled step."""

from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.offline.step_time import Hardware, ModelledSteps, RankLoad
from ep_rebalance.offline.traffic import Traffic
from ep_rebalance.placement import Placement
from ep_rebalance.routing.thresholds import HASH_RANGE, dispatch_thresholds
from ep_rebalance.topology import Topology

FOUR_RANKS = Topology.node_by_node(4, 2)


def placed(*experts_of_ranks: tuple[int, ...]) -> Placement:
    slots_P = np.array(experts_of_ranks, dtype=np.int32).reshape(-1)
    return Placement(slots_P[None], int(slots_P.max()) + 1, len(experts_of_ranks))


def traffic_of(
    placement: Placement, load_E: list[float], quotas_P: list[float], topology: Topology
) -> Traffic:
    return Traffic.of(np.array([load_E]), placement, np.array([quotas_P]), topology)


def test_a_single_replica_keeps_what_its_own_rank_brings() -> None:
    traffic = traffic_of(placed((0, 1), (2, 3)), [4, 8, 2, 2], [1] * 4, Topology.single_node(2))
    assert traffic.home_LR.tolist() == [[6, 2]]
    assert traffic.near_LR.tolist() == [[6, 2]]
    assert not traffic.far_LR.any()
    assert (traffic.home_share, traffic.node_share) == (0.5, 1.0)


def test_a_replica_on_every_rank_keeps_all_tokens_at_home() -> None:
    full = placed((0, 1), (0, 2))
    traffic = traffic_of(full, [8, 4, 4], [0.5, 1, 0.5, 1], Topology.single_node(2))
    assert traffic.home_LR.tolist() == [[4 + 2, 4 + 2]]
    # A quota beyond what the rank brings is filled by the other one.
    traffic = traffic_of(full, [8, 4, 4], [0.75, 1, 0.25, 1], Topology.single_node(2))
    assert traffic.home_LR.tolist() == [[4 + 2, 2 + 2]]
    assert traffic.near_LR.tolist() == [[2 + 2, 2]]


def test_a_replica_on_every_node_keeps_all_tokens_on_their_node() -> None:
    spread = placed((0, 1), (2, 3), (0, 4), (5, 6))
    load_E = [16.0, 0, 0, 0, 0, 0, 0]
    traffic = traffic_of(spread, load_E, [0.5, 1, 1, 1, 0.5, 1, 1, 1], FOUR_RANKS)
    assert traffic.home_LR.tolist() == [[4, 0, 4, 0]]
    assert traffic.near_LR.tolist() == [[4, 0, 4, 0]]
    assert traffic.node_share == 1.0
    # On one node all tokens of the other must cross.
    together = placed((0, 1), (0, 2), (3, 4), (5, 6))
    traffic = traffic_of(together, load_E, [0.5, 1, 0.5, 1, 1, 1, 1, 1], FOUR_RANKS)
    assert traffic.far_LR.tolist() == [[4, 4, 0, 0]]
    assert traffic.node_share == 0.5


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_it_is_what_the_dispatch_tables_do(nodes: int) -> None:
    random, ranks = np.random.default_rng(nodes), 8
    topology = Topology.node_by_node(ranks, ranks // nodes)
    placement = Placement.contiguous(
        num_layers=1, num_experts=16, num_ranks=ranks, num_redundant=16
    )
    load_E = random.integers(1, 1000, 16)
    quotas_LP = random.random((1, placement.num_slots))
    sums_E = np.bincount(placement.slots_LP[0], quotas_LP[0])
    quotas_LP /= sums_E[placement.slots_LP[0]]
    home, near = np.zeros(ranks), np.zeros(ranks)
    for source in range(ranks):
        slots_LEC, thresholds_LEC = dispatch_thresholds(
            placement, [0], quotas_LP, topology=topology, rank=source
        )
        part_EC = np.diff(thresholds_LEC[0] / HASH_RANGE, axis=1, prepend=0)
        for slots_C, part_C, load in zip(slots_LEC[0], part_EC, load_E, strict=True):
            for slot, part in zip(slots_C, part_C, strict=True):
                rank = slot // placement.slots_per_rank
                if slot >= 0 and rank == source:
                    home[rank] += load / ranks * part
                elif slot >= 0 and topology.link(source, rank) == "intranode":
                    near[rank] += load / ranks * part
    traffic = Traffic.of(load_E[None], placement, quotas_LP, topology)
    assert traffic.home_LR[0] == pytest.approx(home, abs=0.5)
    assert traffic.near_LR[0] == pytest.approx(near, abs=0.5)
    assert traffic.pairs == pytest.approx(load_E.sum())
    for copies_LR in traffic.copies_LR(8):
        assert np.isfinite(copies_LR).all()
        assert copies_LR.min() >= 0.0
    if nodes == 1:
        assert not traffic.copies_LR(8)[1].any()


def test_a_token_is_sent_once_to_each_rank_and_node_that_holds_its_experts() -> None:
    """Each rank brings 8 tokens with 2 experts each, a quarter of the pairs to each rank."""
    even = placed((0,), (1,), (2,), (3,))
    within_LR, across_LR = traffic_of(even, [16.0] * 4, [1] * 4, FOUR_RANKS).copies_LR(2)
    # Of a rank's tokens 1 - (3/4)^2 = 7/16 have an expert on a given rank, 3/4 on a given node.
    assert within_LR == pytest.approx(np.full((1, 4), 3 * 8 * 7 / 16))
    assert across_LR == pytest.approx(np.full((1, 4), 2 * 8 * 3 / 4 / 2))
    at_home = traffic_of(
        placed((0, 1), (0, 1), (0, 1), (0, 1)), [32.0, 32.0], [0.25] * 8, FOUR_RANKS
    )
    assert not np.any(at_home.copies_LR(2))


def test_a_layer_without_tokens_sends_none() -> None:
    idle = traffic_of(placed((0,), (1,)), [0, 0], [1, 1], Topology.single_node(2))
    assert (idle.pairs, idle.home_share, idle.node_share) == (0.0, 0.0, 0.0)
    assert not np.any(idle.copies_LR(8))


def step_parts(placement: Placement, load_E: list[int]) -> tuple[float, float, float]:
    """Seconds of (experts, transfers, rest): a token takes 1 s over links, 0.01 s to compute."""
    steps = ModelledSteps(
        hardware=Hardware(
            memory_bytes_per_second=1e9,
            flops_per_second=200.0,
            intranode=4.0,
            internode=1.0,
            memory_bytes=1.0,
        ),
        topology=Topology.single_node(placement.num_ranks),
        expert_bytes_L=(1,),
        bytes_per_parameter=1.0,
        hidden_size=1,
        top_k=1,
        fraction=0.5,
    )
    counts_ALE = np.array([[[0] * len(load_E)], [load_E]])
    snapshot = RecordedSnapshot(
        counts_ALE=counts_ALE, step=1, steps=1, step_seconds=0.0, time=0.0, generation=0
    )
    served = RankLoad.of(counts_ALE.sum(axis=0), placement, placement.even_quotas_LP())
    parts = steps.parts(snapshot, served)
    return parts.experts, parts.transfers, parts.rest


def test_tokens_that_stay_at_home_are_not_paid_for() -> None:
    """16 tokens to each of two ranks, half of them from the other one, 3 bytes there and back."""
    experts, transfers, rest = step_parts(placed((0,), (1,)), [16, 16])
    assert (experts, transfers) == pytest.approx((16 * 0.01, 8 * 3 / 4))
    assert rest == pytest.approx(experts + transfers)
    full = step_parts(placed((0, 1), (0, 1)), [16, 16])
    assert full == pytest.approx((16 * 0.01, 0.0, rest))
