"""Step work: the cost of mean and busiest ranks, by phase, on what was served."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ep_rebalance.load.window import LoadSample
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, TokenCost
from ep_rebalance.planning.step_work import StepWork, mean_work, step_work

PLACEMENT = Placement(np.array([[0, 1, 2, 0], [0, 1, 2, 1]]), 3, 2)
QUOTAS_LP = np.array([[0.25, 1.0, 1.0, 0.75], [1.0, 0.5, 1.0, 0.5]])
PREFILL_LE, DECODE_LE = [[40, 0, 0], [0, 0, 80]], [[0, 80, 0], [20, 20, 0]]
SAMPLE = LoadSample(
    counts_ALE=np.array([PREFILL_LE, DECODE_LE]),
    steps=10,
    step_seconds=0.2,
    placement=PLACEMENT,
    quotas_LP=QUOTAS_LP,
)


def work_of(sample: LoadSample, *, by_own_counts: bool = False) -> StepWork:
    work = step_work(sample, TokenCost(), by_own_counts=by_own_counts)
    assert work is not None
    return work


def test_the_busiest_rank_of_a_layer_is_that_of_all_phases() -> None:
    work = work_of(SAMPLE)
    # Layer 0: rank 0 has 10 of prefill and 80 of decode, rank 1 the other 30 of prefill.
    # Layer 1: rank 0 has 30 of decode, rank 1 has 10 of decode and 80 of prefill.
    assert work.seconds == 0.2
    assert work.mean_A == pytest.approx([(20 + 40) / 10, (40 + 20) / 10])
    assert work.busiest_A == pytest.approx([(10 + 80) / 10, (80 + 10) / 10])


def test_tokens_that_were_counted_before_they_were_split_are_spread_evenly() -> None:
    even = work_of(SAMPLE, by_own_counts=True)
    assert even.busiest_A.sum() < work_of(SAMPLE).busiest_A.sum()
    assert even.mean_A.sum() == pytest.approx(work_of(SAMPLE).mean_A.sum())


def test_any_cost_is_divided_as_a_ranks_tokens_are() -> None:
    work = step_work(SAMPLE, RooflineCost(reading=1000.0), by_own_counts=False)
    assert work is not None
    cost_LR = [[1000.0 * (2 - np.exp(-1.0) - np.exp(-8.0)), 1000.0 * (1 - np.exp(-3.0))],
                  [1000.0 * (2 - np.exp(-2.0) - np.exp(-1.0)),
                   1000.0 * (2 - np.exp(-8.0) - np.exp(-1.0))]]  # fmt: skip
    assert work.busiest_A.sum() == pytest.approx(cost_LR[0][0] + cost_LR[1][1])
    assert work.busiest_A[0] == pytest.approx(cost_LR[0][0] / 9 + cost_LR[1][1] * 8 / 9)
    assert work.mean_A.sum() == pytest.approx(np.mean(cost_LR, axis=1).sum())


@pytest.mark.parametrize(
    "unknown",
    [
        {"step_seconds": 0.0},
        {"steps": 0},
        {"counts_ALE": np.zeros((2, 2, 3), dtype=np.int64)},
        {"placement": None},
        {"quotas_LP": None},
        {"quotas_LP": np.full((2, 4), np.nan)},
    ],
)
def test_what_cannot_be_known_is_no_work(unknown) -> None:
    changed = {name: getattr(SAMPLE, name) for name in
               ("counts_ALE", "steps", "step_seconds", "placement", "quotas_LP")}  # fmt: skip
    sample = LoadSample(**changed | unknown)
    assert step_work(sample, TokenCost(), by_own_counts=False) is None


def test_a_layer_without_tokens_adds_nothing() -> None:
    counts_ALE = SAMPLE.counts_ALE.copy()
    counts_ALE[:, 0] = 0
    quiet = LoadSample(
        counts_ALE=counts_ALE, steps=10, step_seconds=0.2, placement=PLACEMENT, quotas_LP=QUOTAS_LP
    )
    assert work_of(quiet).busiest_A == pytest.approx([8, 1])


def test_mean_work_is_that_of_all() -> None:
    one = work_of(SAMPLE)
    other = replace(one, seconds=0.4, busiest_A=3 * one.busiest_A)
    mean = mean_work([one, other])
    assert mean.seconds == pytest.approx(0.3)
    assert mean.busiest_A == pytest.approx(2 * one.busiest_A)
    assert mean.mean_A == pytest.approx(one.mean_A)
