"""What moving experts could gain, and whether it lasts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from traces import contiguous, head_of, snapshots

from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.offline.recording import Recording, sum_up
from ep_rebalance.offline.room import Room, room_on
from ep_rebalance.offline.run import NothingRecorded
from ep_rebalance.topology import Topology

RISING = np.arange(1, 9) * 100


def recording(loads: list[np.ndarray]) -> Recording:
    counts_WALE = np.zeros((len(loads), 2, 1, 8), dtype=np.int64)
    for part, load_E in enumerate(loads):
        counts_WALE[part, 1, 0] = load_E
    last = RecordedSnapshot(
        counts_ALE=counts_WALE.sum(axis=0),
        step=16,
        steps=16,
        step_seconds=0.05,
        time=1.0,
        generation=0,
    )
    return Recording(mean=last, counts_WALE=counts_WALE, steps_W=np.full(len(loads), 16))


def room(loads: list[np.ndarray], **options: object) -> Room:
    head = head_of(layers=1, experts=8, ranks=4)
    return room_on(head, recording(loads), Topology.single_node(4), **options)  # type: ignore[arg-type]


def test_eight_experts_on_four_ranks_are_even_in_pairs():
    found = room([RISING[::-1]])
    assert found.loaded == pytest.approx(1500 / 900)
    assert found.placed == pytest.approx(1.0)
    assert found.hottest == pytest.approx(800 / 900)
    assert (found.parts, found.kept, found.next_placed) == (1, None, None)


def test_a_load_that_stays_keeps_all_of_the_gain():
    found = room([RISING] * 3)
    assert found.kept == pytest.approx(1.0)
    assert found.next_loaded == pytest.approx(1500 / 900)


def test_a_load_that_comes_and_goes_keeps_none_of_it():
    left, right = np.array([8, 8, 1, 1, 1, 1, 1, 1]), np.array([8, 1, 8, 1, 1, 1, 1, 1])
    # Placed for the left one, experts 0 and 1 part ways; for the right one 0 and 2 may be together.
    found = room([left, right] * 3)
    assert found.next_bound is not None
    assert found.next_placed is not None
    assert found.next_placed >= found.next_bound
    assert found.kept is None or found.kept <= 1.0 + 1e-9


def test_an_expert_is_always_hot_only_if_it_is_in_every_part():
    steady = np.array([90, 10, 10, 10, 10, 10, 10, 10])
    other = np.array([90, 10, 90, 10, 10, 10, 10, 10])
    found = room([steady, other])
    assert (found.hot, found.always_hot) == (2, 1)
    assert [(one.layer, one.expert) for one in found.hottest_experts] == [(0, 0)]


def test_layers_have_the_models_numbers():
    head = head_of(layers=1, experts=8, ranks=4, moe_layers=[5])
    found = room_on(head, recording([np.array([90, 1, 1, 1, 1, 1, 1, 1])]), Topology.single_node(4))
    assert found.hottest_experts[0].layer == 5


def test_a_phase_without_tokens_in_a_part_leaves_that_part_out():
    whole = recording([RISING, RISING, RISING])
    whole.counts_WALE[1] = 0
    whole.counts_WALE[1, 0, 0] = RISING
    found = room_on(head_of(layers=1, experts=8, ranks=4), whole, Topology.single_node(4), "decode")
    assert found.parts == 2
    assert whole.phases == ("prefill", "decode")


def test_a_trace_is_summed_up_in_parts_that_make_the_whole():
    head = head_of(layers=2, experts=8, ranks=2)
    records = [contiguous(head), *snapshots(head, 30)]
    found = sum_up(records)
    assert found.steps_W.tolist() == [64] * 7 + [32]
    total_ALE = sum(one.counts_ALE.astype(np.int64) for one in records[1:])
    assert (found.counts_WALE.sum(axis=0) == total_ALE).all()
    assert (found.mean.counts_ALE == total_ALE).all()
    assert found.mean.steps == 480


def test_a_trace_without_tokens_tells_nothing():
    with pytest.raises(NothingRecorded):
        sum_up([contiguous(head_of())])
    [snapshot] = snapshots(head_of(), 1)
    with pytest.raises(NothingRecorded, match="of no tokens that a step computed them"):
        sum_up([contiguous(head_of()), replace(snapshot, steps=0)])
