"""Rank balance: recent snapshots weigh what their tokens weigh, and counters add all of them up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ep_rebalance.commit import Served
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.journal import initial_status
from ep_rebalance.metrics import encode
from ep_rebalance.overview import HOTTEST, overview
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.rank_balance import HALF_LIFE_SNAPSHOTS, RankBalance, RecentImbalance

LOADED = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
SERVED = Served.initial(Placement(np.array([[0, 2, 1, 3], [0, 1, 2, 3]]), 4, 2))
COUNTS = arrays(np.int64, (2, 2, 4), elements=st.integers(0, 1000))


def test_one_snapshot_is_its_own_imbalance():
    recent = RecentImbalance(2)
    assert (recent.of_layers(), recent.overall()) == ([], None)
    loads_LR = np.array([[30.0, 10.0], [20.0, 20.0]])
    recent.add(loads_LR)
    assert recent.of_layers() == imbalance_L(loads_LR).tolist()
    assert recent.overall() == (30 + 20) / (20 + 20)


def test_a_snapshot_weighs_what_its_tokens_weigh():
    recent = RecentImbalance(1)
    recent.add(np.array([[1000.0, 1000.0]]))
    recent.add(np.array([[2.0, 0.0]]))
    assert recent.overall() < 1.01


def test_older_snapshots_fade_and_idle_ones_change_nothing():
    recent = RecentImbalance(1)
    recent.add(np.array([[20.0, 0.0]]))
    for _ in range(HALF_LIFE_SNAPSHOTS):
        recent.add(np.array([[0.0, 0.0]]))
    assert recent.overall() == 2.0
    for _ in range(HALF_LIFE_SNAPSHOTS):
        recent.add(np.array([[10.0, 10.0]]))
    fade = 0.5 ** (1 / HALF_LIFE_SNAPSHOTS)
    even = sum(fade**age for age in range(HALF_LIFE_SNAPSHOTS))
    assert recent.overall() == pytest.approx((0.5 * 20 + 10 * even) / (0.5 * 10 + 10 * even))


@given(st.lists(COUNTS, min_size=1, max_size=5))
def test_counters_add_up_all_snapshots(snapshots):
    balance = RankBalance(LOADED)
    for counts_ALE in snapshots:
        balance.add(counts_ALE, SERVED)
    routed = sum(int(counts.sum()) for counts in snapshots)
    assert balance.rank_tokens_LR.sum() == routed
    for name, placement in (("served", SERVED.placement), ("contiguous", LOADED)):
        loads = [placement.rank_load_LR(counts.sum(0)) for counts in snapshots]
        assert balance.busiest_tokens[name] == sum(load.max(1).sum() for load in loads)
        assert balance.busiest_tokens[name] >= routed / 2


def test_phases_are_told_apart():
    balance = RankBalance(LOADED)
    prefill, decode = np.full((2, 4), 5), np.array([[8, 0, 0, 0], [0, 0, 0, 8]])
    balance.add(np.array([prefill, decode]), SERVED)
    assert balance.phases["prefill"].overall() == 1.0
    assert balance.phases["decode"].overall() == 2.0


def test_overview_names_the_hottest_experts_and_all_their_ranks():
    placement = Placement(np.array([[0, 1, 2, 0, 3, 1], [0, 1, 2, 3, 0, 1]]), 4, 2)
    status = initial_status(config=RebalanceConfig(), model="m", placement=placement, top_k=2)
    loads_LE = np.array([[8.0, 4, 2, 2], [1, 1, 1, 1]])
    loads_LR = placement.rank_load_LR(loads_LE)
    seen = overview(status, loads_LR, loads_LE, placement)
    assert (seen.hottest[0].layer, seen.hottest[0].expert) == (0, 0)
    assert (seen.hottest[0].load, seen.hottest[0].ranks) == (2.0, [0, 1])
    assert len(seen.hottest) == min(HOTTEST, loads_LE.size)
    assert [hot.load for hot in seen.hottest] == sorted(
        (h.load for h in seen.hottest), reverse=True
    )
    assert seen.rank_load == (loads_LR / loads_LR.mean(1, keepdims=True)).round(3).tolist()
    assert b'"rank_load":[]' in encode(overview(status, 0 * loads_LR, 0 * loads_LE, placement))
