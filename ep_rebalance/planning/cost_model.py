"""Cost model: what a rank's work costs, and the split of tokens that makes it cost least.

Token counts are enough where experts are bound by arithmetic, as in prefill. In decode a rank mostly
reads weights. Its cost is then the number of experts that it must read, however few tokens each of
them has (METRO, arXiv 2512.09277). `RooflineCost` takes the longer of two times: reading the activated
experts, and computing the tokens. Both are in tokens, so that plans do not depend on how large an expert
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.active_replicas import concentrate, read_part
from ep_rebalance.planning.quotas import split_quotas

_MOSTLY_READING = 1.5
"""Experts are planned by what it takes to read them where a rank with even load could compute so many times
its tokens meanwhile. Nearer than that, the busiest rank is one that computes.
"""


class CostModel(Protocol):
    """What a rank's work costs, in tokens."""

    def split(self, load: WindowLoad, placement: Placement) -> NDArray[np.float64]:
        """float64 [L, P], the quotas with which the costliest rank costs least."""
        ...

    def expert_cost_WLE(self, load: WindowLoad) -> NDArray[np.float64]:
        """float64 [W, L, E], what planners even out. Replicas share it."""
        ...

    def rank_cost_WLR(
        self, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64 [W, L, R], cost of each rank."""
        ...

    def even_cost_WL(self, load: WindowLoad, num_ranks: int) -> NDArray[np.float64]:
        """float64 [W, L], what each rank would cost if ranks were even and no expert were read twice."""
        ...


@dataclass(frozen=True, slots=True)
class TokenCost:
    """The cost of a rank is the number of tokens that it computes."""

    def split(self, load: WindowLoad, placement: Placement) -> NDArray[np.float64]:
        return split_quotas(placement, load.load_LE)

    def expert_cost_WLE(self, load: WindowLoad) -> NDArray[np.float64]:
        return load.tokens_WLE

    def rank_cost_WLR(
        self, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return placement.rank_load_LR(load.tokens_WLE, quotas_LP)

    def even_cost_WL(self, load: WindowLoad, num_ranks: int) -> NDArray[np.float64]:
        even_WL: NDArray[np.float64] = load.tokens_WLE.sum(axis=2) / num_ranks
        return even_WL


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCost:
    """The cost of a rank is the longer of two times: reading weights, and computing tokens.

    reading: tokens. How many are computed in the time in which the weights of an expert are read.
    """

    reading: float

    def split(self, load: WindowLoad, placement: Placement) -> NDArray[np.float64]:
        quotas_LP = split_quotas(placement, load.load_LE)
        steps = max(float(load.weight_W @ load.steps_W), 1e-300)
        return concentrate(placement, load.load_LE / steps, self.reading, quotas_LP)

    def expert_cost_WLE(self, load: WindowLoad) -> NDArray[np.float64]:
        tokens_WLE = _per_step(load)
        read_WLE = self.read_cost(tokens_WLE)
        reads_WL = read_WLE.sum(axis=2) > _MOSTLY_READING * tokens_WLE.sum(axis=2)
        slower_WLE = np.where(reads_WL[..., None], np.maximum(read_WLE, tokens_WLE), tokens_WLE)
        cost_WLE: NDArray[np.float64] = slower_WLE * load.steps_W[:, None, None]
        return cost_WLE

    def rank_cost_WLR(
        self, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        tokens_WLP = placement.slot_load_LP(_per_step(load), quotas_LP)
        # Reading and computing overlap over all experts of a rank, not expert by expert.
        slower_WLR = np.maximum(
            placement.rank_sums_LR(self.read_cost(tokens_WLP)), placement.rank_sums_LR(tokens_WLP)
        )
        cost_WLR: NDArray[np.float64] = slower_WLR * load.steps_W[:, None, None]
        return cost_WLR

    def even_cost_WL(self, load: WindowLoad, num_ranks: int) -> NDArray[np.float64]:
        tokens_WLE = _per_step(load)
        slower_WL = np.maximum(self.read_cost(tokens_WLE).sum(axis=2), tokens_WLE.sum(axis=2))
        even_WL: NDArray[np.float64] = slower_WL * load.steps_W[:, None] / num_ranks
        return even_WL

    def read_cost(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """What reading an expert costs that gets so many tokens in a mean step."""
        return read_part(tokens) * self.reading


def mean_imbalance_L(
    cost: CostModel, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [L], cost of the costliest rank over that of even ranks, averaged over the samples by weight;
    1 where a sample of a layer has no tokens.
    """
    busiest_WL = cost.rank_cost_WLR(load, placement, quotas_LP).max(axis=2)
    even_WL = cost.even_cost_WL(load, placement.num_ranks)
    imbalance_WL = np.where(even_WL > 0, busiest_WL / np.where(even_WL > 0, even_WL, 1.0), 1.0)
    mean_L: NDArray[np.float64] = np.average(imbalance_WL, axis=0, weights=load.weight_W)
    return mean_L


def cost_model(config: RebalanceConfig) -> CostModel:
    """The cost model that the settings `planner.objective` and `hardware` ask for."""
    hardware = config.hardware
    if config.planner.objective == "tokens":
        return TokenCost()
    assert hardware.memory_bytes_per_second is not None
    assert hardware.flops_per_second is not None
    return RooflineCost(
        reading=reading_tokens(
            hardware.memory_bytes_per_second,
            hardware.flops_per_second,
            hardware.bytes_per_parameter,
        )
    )


def reading_tokens(
    memory_bytes_per_second: float, flops_per_second: float, bytes_per_parameter: float
) -> float:
    """How many tokens an expert computes in the time in which its weights are read."""
    # A token takes 2 operations for each parameter, so 2 / bytes_per_parameter for each byte.
    return flops_per_second * bytes_per_parameter / (2.0 * memory_bytes_per_second)


def _per_step(load: WindowLoad) -> NDArray[np.float64]:
    per_step: NDArray[np.float64] = load.tokens_WLE / load.steps_W[:, None, None]
    return per_step
