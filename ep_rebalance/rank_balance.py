"""Rank balance: how evenly the EP ranks were loaded lately, and would have been without rebalancing.

One snapshot says little when it holds few tokens. Imbalance is therefore that of recent snapshots
together, each weighing what its tokens weigh; older ones fade.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.commit import Served
from ep_rebalance.load_window import PHASES
from ep_rebalance.placement import Placement

HALF_LIFE_SNAPSHOTS = 4
"""Snapshots with tokens after which one counts half."""

_FADE = 0.5 ** (1 / HALF_LIFE_SNAPSHOTS)


class RecentImbalance:
    """Tokens of the busiest rank and of the mean rank, layer by layer, summed over recent snapshots."""

    def __init__(self, layers: int) -> None:
        self._busiest_L = np.zeros(layers)
        self._mean_L = np.zeros(layers)

    def add(self, rank_load_LR: NDArray[np.float64]) -> None:
        """One more snapshot; one without tokens changes nothing."""
        if rank_load_LR.any():
            self._busiest_L = _FADE * self._busiest_L + rank_load_LR.max(axis=1)
            self._mean_L = _FADE * self._mean_L + rank_load_LR.mean(axis=1)

    def of_layers(self) -> list[float]:
        """Max over mean per layer; 1 where a layer saw no tokens, [] before the first tokens."""
        if not self._mean_L.any():
            return []
        safe_L = np.where(self._mean_L > 0, self._mean_L, 1.0)
        ratios: list[float] = np.where(self._mean_L > 0, self._busiest_L / safe_L, 1.0).tolist()
        return ratios

    def overall(self) -> float | None:
        """Max summed over layers over mean summed over layers: layers wait one after the other."""
        mean = self._mean_L.sum()
        return float(self._busiest_L.sum() / mean) if mean else None


class RankBalance:
    """What snapshots add up to, for one model.

    served, contiguous: as served, and as the placement that the engine loaded would have had it.
    phases: as served, each phase alone.
    recent_LR, recent_LE: float64, tokens of recent snapshots per rank and per logical expert.
    rank_tokens_LR: int64, routed tokens since the start; busiest_tokens: by placement, those of each
    layer's busiest rank, layers summed.
    """

    def __init__(self, contiguous: Placement) -> None:
        layers = contiguous.num_layers
        self.served, self.contiguous = RecentImbalance(layers), RecentImbalance(layers)
        self.phases = {phase: RecentImbalance(layers) for phase in PHASES}
        self.recent_LR = np.zeros((layers, contiguous.num_ranks))
        self.recent_LE = np.zeros((layers, contiguous.num_experts))
        self.rank_tokens_LR = np.zeros((layers, contiguous.num_ranks), dtype=np.int64)
        self.busiest_tokens = {"served": 0, "contiguous": 0}
        self._loaded = contiguous
        self._loaded_quotas_LP = contiguous.even_quotas_LP()

    def add(self, counts_ALE: NDArray[np.int64], served: Served) -> None:
        """One snapshot with tokens, that `served` computed."""
        load_LE = counts_ALE.sum(axis=0)
        by_phase_ALR = served.placement.rank_load_LR(counts_ALE, served.quotas_LP)
        served_LR = by_phase_ALR.sum(axis=0)
        contiguous_LR = self._loaded.rank_load_LR(load_LE, self._loaded_quotas_LP)
        self.served.add(served_LR)
        self.contiguous.add(contiguous_LR)
        for phase, rank_load_LR in zip(PHASES, by_phase_ALR, strict=True):
            self.phases[phase].add(rank_load_LR)
        self.recent_LR = _FADE * self.recent_LR + served_LR
        self.recent_LE = _FADE * self.recent_LE + load_LE
        self.rank_tokens_LR += np.rint(served_LR).astype(np.int64)
        self.busiest_tokens["served"] += round(served_LR.max(axis=1).sum())
        self.busiest_tokens["contiguous"] += round(contiguous_LR.max(axis=1).sum())
