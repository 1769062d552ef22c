"""A gain is told from the noise of the trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from traces import head_of, records_of, write_trace

from ep_rebalance.config_sources import load_config
from ep_rebalance.offline.gain import Gain
from ep_rebalance.offline.run import Replayed, Scenario, replay
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.topology import Topology

SNAPSHOTS = 200


@pytest.fixture(scope="module")
def none(tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    head = head_of(origin="generated")
    records = records_of(write_trace(tmp_path_factory.mktemp("trace"), head, SNAPSHOTS))
    scenario = Scenario(
        policy="none",
        planner=None,
        config=load_config({}),
        topology=Topology.single_node(2),
        step_time=MeasuredSteps(fraction=0.5),
    )
    return replay(head, records, scenario)


def faster(none: Replayed, saved: float, noise: float, seed: int = 0) -> Replayed:
    """Steps that are shorter on average, by a part that differs from snapshot to snapshot."""
    drawn = np.random.default_rng(seed).normal(saved, noise, len(none.seconds_N))
    return replace(none, seconds_N=none.seconds_N * (1 - drawn))


def test_a_gain_beyond_noise_is_sure(none: Replayed) -> None:
    gain = Gain.of(faster(none, 0.05, 0.02), none)
    assert gain.saved == pytest.approx(0.05, abs=0.005)
    assert gain.error == pytest.approx(0.02 / SNAPSHOTS**0.5, rel=0.6)
    assert gain.sure
    assert not gain.loss


def test_noise_is_seldom_called_a_gain(none: Replayed) -> None:
    """Two standard errors leave about 5 %, on both sides together; ten blocks a little more."""
    gains = [Gain.of(faster(none, 0.0, 0.05, seed), none) for seed in range(400)]
    called = [gain for gain in gains if gain.sure or gain.loss]
    assert len(called) / len(gains) < 0.12
    assert all(not (gain.sure and gain.loss) for gain in gains)


def test_the_same_is_neither_gain_nor_loss(none: Replayed) -> None:
    gain = Gain.of(none, none)
    assert (gain.saved, gain.error) == (0.0, 0.0)
    assert not gain.sure
    assert not gain.loss


def test_what_is_shown_as_nothing_is_no_gain(none: Replayed) -> None:
    assert not Gain.of(replace(none, seconds_N=none.seconds_N * 0.9996), none).sure
    assert Gain.of(replace(none, seconds_N=none.seconds_N * 0.999), none).sure


def test_longer_steps_are_a_loss(none: Replayed) -> None:
    gain = Gain.of(faster(none, -0.05, 0.02), none)
    assert gain.loss
    assert not gain.sure


def test_few_snapshots_do_not_tell(none: Replayed) -> None:
    def cut(one: Replayed) -> Replayed:
        return replace(one, seconds_N=one.seconds_N[:9], steps_N=one.steps_N[:9])

    gain = Gain.of(cut(faster(none, 0.5, 0.0)), cut(none))
    assert gain.saved == pytest.approx(0.5)
    assert gain.error is None
    assert not gain.sure


def test_a_gain_in_one_part_of_the_trace_alone_is_not_sure(none: Replayed) -> None:
    """Neighbouring snapshots are alike, so that they are no independent witnesses."""
    seconds_N = none.seconds_N.copy()
    seconds_N[: SNAPSHOTS // 10] *= 0.7
    gain = Gain.of(replace(none, seconds_N=seconds_N), none)
    assert gain.saved == pytest.approx(0.03, abs=0.005)
    assert not gain.sure
