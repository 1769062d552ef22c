"""Rank balance: recent snapshots weigh what their tokens weigh, and counters add all of them up."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.telemetry.imbalance import HALF_LIFE_SNAPSHOTS, BalanceThread, RankBalance
from ep_rebalance.telemetry.journal import initial_status
from ep_rebalance.telemetry.metrics import encode
from ep_rebalance.telemetry.overview_report import HOTTEST, overview

LOADED = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
SERVED = Served.initial(Placement(np.array([[0, 2, 1, 3], [0, 1, 2, 3]]), 4, 2))
COUNTS = arrays(np.int64, (2, 2, 4), elements=st.integers(0, 1000))


def decoded(*loads_LE: list[list[int]]) -> RankBalance:
    """After snapshots in which only decode had tokens."""
    balance = RankBalance(LOADED)
    for load_LE in loads_LE:
        balance.add(np.array([np.zeros((2, 4), dtype=np.int64), load_LE]), SERVED)
    return balance


def test_one_snapshot_is_its_own_imbalance():
    before = RankBalance(LOADED)
    assert (before.served.of_layers(), before.served.overall()) == ([], None)
    load_LE = [[30, 10, 2, 8], [5, 15, 20, 0]]
    balance = decoded(load_LE)
    loads_LR = SERVED.placement.rank_load_LR(np.array(load_LE))
    assert balance.served.of_layers() == imbalance_L(loads_LR).tolist()
    assert balance.served.overall() == loads_LR.max(1).sum() / loads_LR.mean(1).sum()
    assert (
        balance.contiguous.of_layers()
        == imbalance_L(LOADED.rank_load_LR(np.array(load_LE))).tolist()
    )


def test_a_snapshot_weighs_what_its_tokens_weigh():
    balance = decoded([[1000] * 4] * 2, [[2, 0, 0, 0]] * 2)
    assert balance.served.overall() < 1.01


def test_older_snapshots_fade_and_phases_without_tokens_do_not():
    uneven, even = [[20, 0, 0, 0]] * 2, [[5] * 4] * 2
    balance = decoded(uneven)
    prompts = np.array([even, np.zeros((2, 4), dtype=np.int64)])
    for _ in range(HALF_LIFE_SNAPSHOTS):
        balance.add(prompts, SERVED)
    fade = 0.5 ** (1 / HALF_LIFE_SNAPSHOTS)
    later = sum(fade**age for age in range(HALF_LIFE_SNAPSHOTS))
    assert balance.served.overall() == pytest.approx(
        (0.5 * 20 + 10 * later) / (0.5 * 10 + 10 * later)
    )
    assert balance.recent_LE[0] == pytest.approx([10 + 5 * later, 5 * later, 5 * later, 5 * later])
    balance.add(prompts[::-1].copy(), SERVED)
    assert balance.phases["decode"].overall() == pytest.approx((fade * 20 + 10) / (fade * 10 + 10))


@given(st.lists(COUNTS, min_size=1, max_size=3), st.booleans())
def test_tokens_of_ranks_are_those_that_the_placement_gives_them(snapshots, replicated):
    """Whoever may write to the arrays of what is served."""
    placement = Placement(np.array([[0, 1, 2, 3, 0, 2], [0, 1, 2, 3, 0, 1]]), 4, 2)
    quotas_LP = np.array([[0.25, 1, 0.5, 1, 0.75, 0.5], [0.5, 0.5, 1, 1, 0.5, 0.5]])
    quotas_LP.flags.writeable = replicated
    served = Served(placement=placement, quotas_LP=quotas_LP, generation=1)
    balance = RankBalance(LOADED)
    for counts_ALE in snapshots:
        balance.add(counts_ALE, served)
    loads = [placement.rank_load_LR(counts.sum(0), quotas_LP) for counts in snapshots]
    fades = [0.5 ** (age / HALF_LIFE_SNAPSHOTS) for age in reversed(range(len(loads)))]
    assert balance.recent_LR == pytest.approx(
        sum(fade * load for fade, load in zip(fades, loads, strict=True))
    )
    assert (balance.rank_tokens_LR == sum(np.rint(load) for load in loads)).all()
    assert (balance.tokens_ALE == sum(snapshots)).all()


@given(st.lists(arrays(np.int64, (2, 2, 5), elements=st.integers(0, 1000)), min_size=1, max_size=3))
def test_ranks_with_unequally_many_experts_get_the_tokens_of_their_own(snapshots):
    """Three on the first rank, two on the second."""
    loaded = Placement.contiguous(num_layers=2, num_experts=5, num_ranks=2)
    balance = RankBalance(loaded)
    for counts_ALE in snapshots:
        balance.add(counts_ALE, Served.initial(loaded))
    loads = [counts.sum(0) for counts in snapshots]
    loads_NLR = np.array([[load[:, :3].sum(1), load[:, 3:].sum(1)] for load in loads]).swapaxes(
        1, 2
    )
    assert (balance.rank_tokens_LR == loads_NLR.sum(0)).all()
    busiest = int(loads_NLR.max(2).sum())
    assert balance.busiest_tokens == {"served": busiest, "contiguous": busiest}
    assert balance.served.of_layers() == balance.contiguous.of_layers()
    status = initial_status(config=RebalanceConfig(), model="m", placement=loaded, top_k=2)
    for hot in overview(status, balance.recent_LR, balance.recent_LE, loaded).hottest:
        assert hot.ranks == [int(hot.expert >= 3)]


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


def test_the_thread_adds_all_snapshots_in_their_order_and_goes_on_after_one_that_fails(caplog):
    own, behind = RankBalance(LOADED), BalanceThread(RankBalance(LOADED))
    random = np.random.default_rng(0)
    for number in range(30):
        counts_ALE = random.integers(0, 50, (2, 2, 4))
        own.add(counts_ALE, SERVED)
        behind.add(counts_ALE, SERVED)
        if number == 10:
            behind.add(None, SERVED)
    seen = behind.caught_up()
    assert seen.served.of_layers() == own.served.of_layers()
    assert (seen.recent_LR == own.recent_LR).all()
    assert (seen.tokens_ALE == own.tokens_ALE).all()
    assert "a snapshot is missing" in caplog.text


class Ends(Served):
    """What ends a thread that asks for its placement."""

    @property
    def placement(self):
        raise SystemExit

    def __init__(self) -> None:
        pass


def test_what_would_end_the_thread_is_counted_and_keeps_nobody_waiting():
    behind = BalanceThread(RankBalance(LOADED))
    counts_ALE = np.full((2, 2, 4), 3)

    def add() -> None:
        for _ in range(20):
            behind.add(counts_ALE, Ends())
        behind.add(counts_ALE, SERVED)
        behind.caught_up()

    waited = threading.Thread(target=add, daemon=True)
    waited.start()
    waited.join(30)
    assert not waited.is_alive()
    assert behind.failed == 20
    assert (behind.caught_up().tokens_ALE == counts_ALE).all()


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


def test_the_map_of_many_ranks_has_a_column_for_the_busiest_of_neighbours():
    placement = Placement.contiguous(num_layers=1, num_experts=600, num_ranks=600)
    status = initial_status(config=RebalanceConfig(), model="m", placement=placement, top_k=2)
    load_LR = np.ones((1, 600))
    load_LR[0, [4, 599]] = 2.0, 3.0
    seen = overview(status, load_LR, np.ones((1, 600)), placement)
    over_mean = np.round([1.0, 2.0, 3.0] / load_LR.mean(), 3).tolist()
    assert (seen.ranks_per_column, len(seen.rank_load[0])) == (3, 200)
    assert [seen.rank_load[0][column] for column in (0, 1, 199)] == over_mean


def test_tokens_that_were_split_by_their_own_counts_are_booked_so():
    placement = Placement(np.array([[0, 1, 1, 2], [0, 1, 0, 2]]), 3, 2)
    served = Served.initial(placement)
    load_LE = np.array([[10, 40, 30], [50, 0, 10]])
    counts_ALE = np.array([np.zeros_like(load_LE), load_LE])
    rank_tokens = []
    for by_own_counts in (False, True):
        balance = RankBalance(placement, by_own_counts=by_own_counts)
        balance.add(counts_ALE, served)
        rank_tokens.append(balance.rank_tokens_LR.tolist())
    # By quotas, the halves; else as even as the replicas allow.
    assert rank_tokens == [[[30, 50], [25, 35]], [[40, 40], [30, 30]]]
