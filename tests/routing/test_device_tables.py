"""Counters and dispatch tables of one rank: what is counted, and what is not."""

import numpy as np
import pytest
import torch
from step_path import DEVICE, recording_waits

from ep_rebalance.kernels.shared_arithmetic import DECODE, IGNORED, PREFILL
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.routing.thresholds import HASH_STRIDE
from ep_rebalance.topology import Topology

PLACEMENT = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2, num_redundant=2)
PHASES = np.array([PREFILL, PREFILL, DECODE])
IDS = torch.tensor([[0, 1], [0, 2], [3, 1]], dtype=torch.int32)


def make_counts(
    counts_here: bool = True, device: torch.device | str = "cpu", by_own_counts: bool = False
) -> RoutingTables:
    counts = RoutingTables(
        placement=PLACEMENT,
        max_tokens=16,
        device=torch.device(device),
        topology=Topology.single_node(2),
        rank=0,
        counts_here=counts_here,
        by_own_counts=by_own_counts,
    )
    counts.set_dispatch(range(PLACEMENT.num_layers), PLACEMENT, PLACEMENT.even_quotas_LP())
    return counts


def test_marked_tokens_are_counted_in_their_phase_and_layer():
    counts = make_counts()
    counts.mark_tokens(PHASES)
    counts.route(1, IDS, 0)
    assert counts.counts_LAE[1, PREFILL].tolist() == [2, 1, 1, 0]
    assert counts.counts_LAE[1, DECODE].tolist() == [0, 1, 0, 1]
    assert not counts.counts_LAE[0].any()


def test_rows_behind_the_marked_tokens_are_padding():
    counts = make_counts()
    counts.mark_tokens(PHASES[:1])
    counts.route(0, IDS, 0)
    assert counts.counts_LAE[0, PREFILL].tolist() == [1, 1, 0, 0]
    assert not counts.counts_LAE[0, DECODE].any()


def test_steps_without_marked_tokens_count_nothing():
    counts = make_counts()
    counts.route(0, IDS, 0)
    counts.mark_tokens(PHASES)
    counts.end_step()
    counts.route(0, IDS, 0)
    assert not counts.counts_LAE[:, :2].any()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 0), (0, 3), (2, 2)])
def test_marking_again_forgets_the_marks_before(before, after):
    """A step that was prepared and then dropped leaves nothing behind."""
    counts = make_counts()
    counts.mark_tokens(np.full(before, DECODE))
    counts.mark_tokens(np.full(after, PREFILL))
    assert counts.phase_T.tolist() == [PREFILL] * after + [IGNORED] * (16 - after)
    counts.end_step()
    assert (counts.phase_T == IGNORED).all()


def test_a_rank_that_shares_its_tokens_marks_none():
    counts = make_counts(counts_here=False)
    counts.mark_tokens(PHASES)
    slots = counts.route(0, IDS, 0)
    assert (counts.phase_T == IGNORED).all()
    assert not counts.counts_LAE[:, :2].any()
    assert (PLACEMENT.slots_LP[0][slots.numpy()] == IDS.numpy()).all()


def test_first_token_says_which_part_of_the_batch_the_rows_are():
    counts = make_counts()
    counts.mark_tokens(PHASES)
    counts.route(0, IDS[2:], 2)
    assert counts.counts_LAE[0, DECODE].tolist() == [0, 1, 0, 1]
    assert not counts.counts_LAE[0, PREFILL].any()


def test_the_hash_moves_on_with_every_step_and_comes_to_every_offset():
    counts = make_counts()
    for step in range(5):
        counts.mark_tokens(PHASES[:step])
        assert int(counts.offset) == step * HASH_STRIDE % 65536
        counts.end_step()
    assert len({step * HASH_STRIDE % 65536 for step in range(65536)}) == 65536


def test_ranks_that_share_tokens_have_the_same_hash_in_the_same_step():
    counting, sharing = make_counts(), make_counts(counts_here=False)
    for step in range(5):
        for counts in (counting, sharing):
            if step % 2:
                counts.mark_tokens(PHASES)
            counts.end_step()
        assert torch.equal(counting.offset, sharing.offset)
    assert int(counting.offset)


def test_a_step_larger_than_reserved_is_counted_as_far_as_it_fits(caplog):
    """Failing here would be the server's failure."""
    counts = make_counts()
    ids = torch.zeros(20, 1, dtype=torch.int32)
    for _ in range(2):
        counts.mark_tokens(np.full(20, DECODE))
        slots = counts.route(0, ids, 0)
        assert (PLACEMENT.slots_LP[0][slots.numpy()] == 0).all()
        counts.end_step()
    assert counts.counts_LAE[0, DECODE].tolist() == [32, 0, 0, 0]
    assert [record.message for record in caplog.records] == [
        "ep_rebalance: a step has 20 tokens; only its first 16 are counted"
    ]


@pytest.mark.parametrize("first_token", [8, 16, 40])
def test_rows_behind_all_phases_are_routed_and_not_counted(first_token):
    counts = make_counts()
    counts.mark_tokens(np.full(16, PREFILL))
    ids = torch.ones(12, 2, dtype=torch.int32)
    assert (PLACEMENT.slots_LP[0][counts.route(0, ids, first_token).numpy()] == 1).all()
    counts.count(0, ids, first_token)
    assert int(counts.counts_LAE[0, PREFILL, 1]) == 2 * 2 * max(0, 16 - first_token)


@pytest.mark.parametrize("rows", ["some", "all"])
def test_padding_is_neither_counted_nor_given_a_slot(rows):
    """Engines write -1 for rows that no token is in; also where a row that was marked is empty."""
    counts = make_counts()
    counts.mark_tokens(PHASES)
    ids = IDS.clone()
    ids[1 if rows == "some" else slice(None)] = -1
    slots = counts.route(0, ids, 0)
    counts.count(1, ids, 0)
    assert ((slots == -1) == (ids == -1)).all()
    assert int(counts.counts_LAE[:, :2].sum()) == 2 * int((ids >= 0).sum())
    assert counts.counts_LAE[0].tolist() == counts.counts_LAE[1].tolist()


def test_warming_up_leaves_counts_and_phases_as_they_were():
    counts = make_counts()
    counts.mark_tokens(PHASES)
    counts.route(0, IDS, 0)
    before = counts.counts_LAE.clone(), counts.phase_T.clone(), counts.offset.clone()
    counts.warm_up()
    for value, now in zip(before, (counts.counts_LAE, counts.phase_T, counts.offset), strict=True):
        assert torch.equal(value, now)


@pytest.mark.parametrize("counts_here", [True, False])
def test_nothing_in_a_step_waits_for_the_device(counts_here):
    with recording_waits() as waits:
        counts = make_counts(counts_here, DEVICE)
        counts.warm_up()
        refreshed = counts.dispatch_tables(PLACEMENT, PLACEMENT.even_quotas_LP())
        ids = torch.zeros(8, 2, dtype=torch.int32, device=DEVICE)
        waits.clear()
        for step in range(9):
            counts.mark_tokens(PHASES)
            counts.mark_tokens(PHASES[: step % 4])
            for layer in range(PLACEMENT.num_layers):
                counts.route(layer, ids, step)
                counts.count(layer, ids, step)
            counts.end_step()
            waits.end_step()
            counts.serve((step % 2,), refreshed)
            counts.split(refreshed)
    assert waits == []


def test_dispatch_tables_are_changed_in_place_and_for_one_layer():
    """CUDA graphs hold the addresses."""
    counts = make_counts()
    tables = counts.layers[1]
    addresses = tables.replica_slots_EC.data_ptr(), tables.thresholds_EC.data_ptr()
    other = counts.layers[0].replica_slots_EC.clone()
    target = Placement(PLACEMENT.slots_LP[:, ::-1], 4, 2)
    counts.set_dispatch((1,), target, target.even_quotas_LP())
    assert (tables.replica_slots_EC.numpy() == target.replica_slots(1)).all()
    assert (tables.replica_slots_EC.data_ptr(), tables.thresholds_EC.data_ptr()) == addresses
    assert torch.equal(counts.layers[0].replica_slots_EC, other)


def test_a_new_split_is_what_setting_the_tables_would_have_made():
    counts, same = make_counts(), make_counts()
    load_LE = np.array([[5, 1, 9, 1], [1, 9, 1, 8]])
    quotas_LP = split_quotas(PLACEMENT, load_LE)
    before = counts.layers[0].thresholds_EC.clone()
    counts.split(counts.dispatch_tables(PLACEMENT, quotas_LP))
    same.set_dispatch((0, 1), PLACEMENT, quotas_LP)
    for ours, expected in zip(counts.layers, same.layers, strict=True):
        assert torch.equal(ours.thresholds_EC, expected.thresholds_EC)
        assert torch.equal(ours.replica_slots_EC, expected.replica_slots_EC)
    assert not torch.equal(before, counts.layers[0].thresholds_EC)


def test_tables_of_the_layers_share_memory_with_the_counters():
    counts = make_counts()
    counts.layers[0].counts_AE[PREFILL, 1] = 5
    assert counts.counts_LAE[0, PREFILL, 1] == 5


def test_before_tables_are_served_tokens_go_nowhere():
    """Memory that is reserved may hold anything, and the tables are read to the end."""
    counts = RoutingTables(
        placement=PLACEMENT,
        max_tokens=16,
        device=torch.device("cpu"),
        topology=Topology.single_node(2),
        rank=0,
        by_own_counts=True,
    )
    for tables in counts.layers:
        assert (tables.replica_slots_EC == -1).all()
    assert (counts.route(0, IDS, 0) == -1).all()


def test_tables_for_own_counts_follow_commits_and_splits_in_place():
    """A layer that is served anew also has another order of pouring; a split changes where it begins, and
    the ground.
    """
    counts, same = (make_counts(by_own_counts=True) for _ in range(2))
    addresses = [(p.poured_X.data_ptr(), p.ground_R.data_ptr()) for p in counts.pours]
    target = Placement(np.array([[0, 1, 2, 0, 1, 3], [2, 3, 1, 2, 3, 0]]), 4, 2)
    load_LE = np.array([[5.0, 1, 9, 1], [1, 9, 1, 8]])
    quotas_LP = split_quotas(target, load_LE)
    mixed = PLACEMENT.replaced((1,), target)
    before = counts.pours[0].poured_X.clone()
    counts.serve((1,), counts.dispatch_tables(target, target.even_quotas_LP()))
    assert torch.equal(counts.pours[0].poured_X, before)
    assert not counts.pours[1].ground_R.any()
    counts.split(counts.dispatch_tables(mixed, quotas_LP, load_LE))
    assert counts.pours[1].ground_R.any()
    same.serve((0, 1), same.dispatch_tables(mixed, quotas_LP, load_LE))
    assert [(p.poured_X.data_ptr(), p.ground_R.data_ptr()) for p in counts.pours] == addresses
    ids = torch.tensor([[e, (e + n) % 4] for n in (1, 2, 3) for e in range(4)], dtype=torch.int32)
    for layer in range(2):
        sent = counts.route(layer, ids, 0)
        assert torch.equal(sent, same.route(layer, ids, 0))
        assert (mixed.slots_LP[layer][sent.numpy()] == ids.numpy()).all()
    assert not torch.equal(counts.pours[1].row_E, counts.pours[0].row_E)


@pytest.mark.parametrize("by_own_counts", [False, True])
def test_a_slot_that_is_strictly_without_quota_gets_no_token(by_own_counts):
    counts = make_counts(by_own_counts=by_own_counts)
    last = [PLACEMENT.slots_LP[0].tolist()[::-1].index(expert) for expert in range(4)]
    last = sorted(PLACEMENT.num_slots - 1 - place for place in last)
    quotas_LP = np.array([np.isin(range(PLACEMENT.num_slots), last)] * 2, dtype=float)
    ids = torch.arange(4, dtype=torch.int32).repeat(200, 1)
    counts.set_dispatch([1], PLACEMENT, quotas_LP, strictly=True)
    assert counts.route(1, ids, 0).unique().tolist() == last
    assert counts.route(0, ids, 0).unique().tolist() != last
    counts.set_dispatch([1], PLACEMENT, PLACEMENT.even_quotas_LP())
    assert counts.route(1, ids, 0).unique().tolist() != last
