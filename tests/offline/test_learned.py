"""What a trace tells of the experts' part of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from traces import contiguous, head_of, snapshots

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import Record, RecordedPlacement, TraceHead
from ep_rebalance.offline.learned import expert_time
from ep_rebalance.placement import Placement

HEAD = head_of(layers=3, experts=32, ranks=4, redundant=0)
AUTO = RebalanceConfig()
SERVED = 40
"""Snapshots before and after the placement changes."""


def served(waits: float, noise: float = 0.01) -> Iterator[Record]:
    """A server that moves experts once; `waits` of a step waits for the busiest ranks at first."""
    rng = np.random.default_rng(0)
    first = contiguous(HEAD)
    slots_LP = np.concatenate([rng.permuted(np.arange(32)[None], axis=1) for _ in range(3)])
    moved = RecordedPlacement(
        placement=Placement(slots_LP.astype(np.int32), 32, 4),
        quotas_LP=np.ones((3, 32)),
        generation=1,
        step=16 * SERVED,
        time=100.0,
    )
    usual = 0.0
    for number, snapshot in enumerate(snapshots(HEAD, 2 * SERVED)):
        change = {0: first, SERVED: moved}.get(number)
        if change is not None:
            yield change
        placement = (first if number < SERVED else moved).placement
        load_LE = snapshot.counts_ALE.sum(axis=0, dtype=np.int64)
        busiest = placement.rank_load_LR(load_LE).max(axis=1).sum()
        usual = usual or busiest
        seconds = 0.05 * (1.0 - waits + waits * busiest / usual) * (1.0 + noise * rng.normal())
        yield replace(snapshot, step_seconds=seconds, generation=int(number >= SERVED))


@pytest.mark.parametrize("waits", [0.1, 0.4, 0.8])
def test_a_recorded_server_tells_what_of_its_steps_waited(waits: float) -> None:
    told = expert_time(HEAD, served(waits), AUTO)
    assert told.source == "learned"
    assert abs(told.fraction - waits) < 3 * told.standard_error < 0.25


def test_what_is_set_is_not_learned() -> None:
    settings = load_config({"decision": {"expert_time_fraction": 0.7}})
    told = expert_time(HEAD, served(0.4), settings)
    assert (told.fraction, told.source) == (0.7, "set")


@pytest.mark.parametrize(
    ("head", "records", "reason"),
    [
        (HEAD, list(served(0.4))[:10], "fewer than 16"),
        (head_of(layers=3, experts=32, ranks=4, origin="a file"), [], "no server was recorded"),
        (HEAD, [], "fewer than 16"),
    ],
)
def test_a_trace_that_tells_nothing_leaves_the_assumption(
    head: TraceHead, records: list[Record], reason: str
) -> None:
    told = expert_time(head, records, AUTO)
    assert (told.fraction, told.source) == (0.5, "assumed")
    assert reason in told.reason
