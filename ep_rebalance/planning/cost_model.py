"""Cost model: what a rank's work costs, in tokens or in seconds.

Token counts are enough where experts are bound by arithmetic, as in prefill. In decode a rank mostly
reads weights. Its cost is then the number of experts that it must read, however few tokens each of
them has, so that more replicas of a hot expert cost more (METRO, arXiv 2512.09277). `RooflineCost`
takes the longer of two times: reading the activated experts, and computing the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement, imbalance_L


class CostModel(Protocol):
    """What a rank's work costs, in any unit that can be compared between ranks."""

    def expert_cost_WLE(self, load: WindowLoad) -> NDArray[np.float64]:
        """float64 [W, L, E], cost of each expert if it has a single replica."""
        ...

    def replica_part_EC(
        self, load: WindowLoad, layer: int, max_replicas: int
    ) -> NDArray[np.float64]:
        """float64 [E, max_replicas + 2], the share of that cost that each replica bears; column `c`
        is for `c` replicas, and column 0 is 0.
        """
        ...

    def rank_cost_WLR(
        self, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64 [W, L, R], cost of each rank."""
        ...


@dataclass(frozen=True, slots=True)
class TokenCost:
    """The cost of a rank is the number of tokens that it computes."""

    def expert_cost_WLE(self, load: WindowLoad) -> NDArray[np.float64]:
        return load.tokens_WLE

    def replica_part_EC(
        self, load: WindowLoad, layer: int, max_replicas: int
    ) -> NDArray[np.float64]:
        return _even_parts(load.tokens_WLE.shape[2], max_replicas)

    def rank_cost_WLR(
        self, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return placement.rank_load_LR(load.tokens_WLE, quotas_LP)


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCost:
    """The cost of a rank is the longer of two times: reading weights, and computing tokens.

    expert_bytes_L: L sizes, bytes. One expert of each layer.
    memory_bytes_per_second: how fast weights are read.
    flops_per_second: how fast tokens are computed.
    flops_per_byte: operations that one token takes for each byte of an expert's weights: 2 for each
        parameter, so 1 for two-byte weights.
    """

    expert_bytes_L: Sequence[int]
    memory_bytes_per_second: float
    flops_per_second: float
    flops_per_byte: float = 1.0

    def expert_cost_WLE(self, load: WindowLoad) -> NDArray[np.float64]:
        seconds_WLE = self._slower(_per_step(load), self._bytes_L[:, None])
        return seconds_WLE * load.steps_W[:, None, None]

    def replica_part_EC(
        self, load: WindowLoad, layer: int, max_replicas: int
    ) -> NDArray[np.float64]:
        # part[e, c] = sum_w weight steps seconds(tokens / c) / sum_w weight steps seconds(tokens)
        tokens_WE = _per_step(load)[:, layer]
        counts_C = np.arange(1, max_replicas + 2)
        seconds_WEC = self._slower(tokens_WE[:, :, None] / counts_C, self._bytes_L[layer])
        cost_EC = np.einsum("w,wec->ec", load.weight_W * load.steps_W, seconds_WEC)
        whole_E1 = cost_EC[:, :1]
        part_EC = np.where(
            whole_E1 > 0, cost_EC / np.where(whole_E1 > 0, whole_E1, 1), 1 / counts_C
        )
        return np.hstack([np.zeros_like(whole_E1), part_EC])

    def rank_cost_WLR(
        self, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        tokens_WLP = placement.slot_load_LP(_per_step(load), quotas_LP)
        read_WLP, computed_WLP = self._seconds(tokens_WLP, self._bytes_L[:, None])
        by_rank = (*tokens_WLP.shape[:2], placement.num_ranks, placement.slots_per_rank)
        # Reading and computing overlap over all experts of a rank, not expert by expert.
        seconds_WLR = np.maximum(
            read_WLP.reshape(by_rank).sum(3), computed_WLP.reshape(by_rank).sum(3)
        )
        total_WLR: NDArray[np.float64] = seconds_WLR * load.steps_W[:, None, None]
        return total_WLR

    @property
    def _bytes_L(self) -> NDArray[np.float64]:
        return np.array(self.expert_bytes_L, dtype=np.float64)

    def _slower(
        self, tokens: NDArray[np.float64], expert_bytes: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        slower: NDArray[np.float64] = np.maximum(*self._seconds(tokens, expert_bytes))
        return slower

    def _seconds(
        self, tokens: NDArray[np.float64], expert_bytes: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of reading and of computing in a step.

        tokens: of an expert in a step, on average.
        expert_bytes: of its weights.

        With `n` tokens a step on average, an expert is read in 1 - exp(-n) of the steps (Poisson).
        """
        read = (1.0 - np.exp(-tokens)) * expert_bytes / self.memory_bytes_per_second
        computed = tokens * expert_bytes * self.flops_per_byte / self.flops_per_second
        return read, computed


def mean_imbalance_L(
    cost: CostModel, load: WindowLoad, placement: Placement, quotas_LP: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [L], max/mean rank cost of each sample, averaged over the samples by weight."""
    cost_WLR = cost.rank_cost_WLR(load, placement, quotas_LP)
    mean_L: NDArray[np.float64] = np.average(imbalance_L(cost_WLR), axis=0, weights=load.weight_W)
    return mean_L


def cost_model(config: RebalanceConfig, expert_bytes_L: Sequence[int]) -> CostModel:
    """The cost model that the settings `planner.objective` and `hardware` ask for."""
    hardware = config.hardware
    if config.planner.objective == "tokens":
        return TokenCost()
    assert hardware.memory_bytes_per_second is not None
    assert hardware.flops_per_second is not None
    return RooflineCost(
        expert_bytes_L=expert_bytes_L,
        memory_bytes_per_second=hardware.memory_bytes_per_second,
        flops_per_second=hardware.flops_per_second,
        flops_per_byte=2.0 / hardware.bytes_per_parameter,
    )


@cache
def _even_parts(experts: int, max_replicas: int) -> NDArray[np.float64]:
    # part[e, c] = 1 / c
    part_C = np.append(0.0, 1.0 / np.arange(1, max_replicas + 2))
    return np.tile(part_C, (experts, 1))


def _per_step(load: WindowLoad) -> NDArray[np.float64]:
    per_step: NDArray[np.float64] = load.tokens_WLE / load.steps_W[:, None, None]
    return per_step
