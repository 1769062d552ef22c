"""Step work: what the mean step of a snapshot took, and how much of the experts' work each rank had in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import LoadSample, window_load
from ep_rebalance.planning.cost_model import CostModel
from ep_rebalance.planning.quotas import split_by_own_counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepWork:
    """A mean step.

    seconds: how long it took; above 0.
    mean_A: float64 [A], cost of a rank on average, summed over layers. By the phase of the tokens.
    busiest_A: float64 [A], cost of each layer's busiest rank, summed over layers.
    """

    seconds: float
    mean_A: NDArray[np.float64]
    busiest_A: NDArray[np.float64]


def step_work(sample: LoadSample, cost: CostModel, *, by_own_counts: bool) -> StepWork | None:
    """The work of a snapshot's mean step, on the placement and by the quotas that served it.

    by_own_counts: whether each step's own tokens were spread evenly over the replicas. The snapshot is then
        taken for one step.

    None if the snapshot has no tokens, no steps, no step time or no placement, or a cost that is not finite.
    A rank's cost is that of all its tokens; each phase has the part of it that it has of the rank's tokens.
    """
    placement, quotas_LP = sample.placement, sample.quotas_LP
    if placement is None or quotas_LP is None:
        return None
    if not sample.routed or not sample.steps or not sample.step_seconds:
        return None
    if by_own_counts:
        quotas_LP = split_by_own_counts(placement, sample.load_LE, quotas_LP)
    cost_LR = cost.rank_cost_WLR(window_load([sample]), placement, quotas_LP)[0] / sample.steps
    tokens_ALR = placement.rank_load_LR(sample.counts_ALE, quotas_LP)
    cost_ALR = cost_LR * tokens_ALR / np.maximum(tokens_ALR.sum(axis=0), 1e-300)
    busiest_L = cost_LR.argmax(axis=1)
    work = StepWork(
        seconds=sample.step_seconds,
        mean_A=cost_ALR.mean(axis=2).sum(axis=1),
        busiest_A=cost_ALR[:, np.arange(len(cost_LR)), busiest_L].sum(axis=1),
    )
    return work if np.isfinite(work.busiest_A).all() else None


def mean_work(works: Sequence[StepWork]) -> StepWork:
    """The mean of one or more; each counts alike."""
    return StepWork(
        seconds=float(np.mean([work.seconds for work in works])),
        mean_A=np.mean([work.mean_A for work in works], axis=0),
        busiest_A=np.mean([work.busiest_A for work in works], axis=0),
    )
