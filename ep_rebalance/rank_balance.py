"""Rank balance: how evenly the EP ranks were loaded lately, and would have been without rebalancing.

One snapshot says little when it holds few tokens. Imbalance is therefore that of recent snapshots
together, each weighing what its tokens weigh; older ones fade.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.commit import Served
from ep_rebalance.load_window import PHASES
from ep_rebalance.placement import Placement
from ep_rebalance.planning.compiled import compiled

HALF_LIFE_SNAPSHOTS = 4
"""Snapshots with tokens after which one counts half."""

_FADE = 0.5 ** (1 / HALF_LIFE_SNAPSHOTS)


class RecentImbalance:
    """Tokens of the busiest rank and of the mean rank, layer by layer, summed over recent snapshots."""

    def __init__(self, layers: int) -> None:
        self._sums_2L = np.zeros((2, layers))

    def add(self, rank_load_LR: NDArray[np.float64]) -> int:
        """One more snapshot; one without tokens changes nothing. Returns the tokens of each layer's
        busiest rank, layers summed."""
        return round(_add_recent(self._sums_2L, rank_load_LR, _FADE))

    def of_layers(self) -> list[float]:
        """Max over mean per layer; 1 where a layer saw no tokens, [] before the first tokens."""
        busiest_L, mean_L = self._sums_2L
        if not mean_L.any():
            return []
        safe_L = np.where(mean_L > 0, mean_L, 1.0)
        ratios: list[float] = np.where(mean_L > 0, busiest_L / safe_L, 1.0).tolist()
        return ratios

    def overall(self) -> float | None:
        """Max summed over layers over mean summed over layers: layers wait one after the other."""
        busiest, mean = self._sums_2L.sum(axis=1)
        return float(busiest / mean) if mean else None


class RankBalance:
    """What snapshots add up to, for one model.

    served, contiguous: as served, and as the placement that the engine loaded would have had it.
    phases: as served, each phase alone.
    recent_LR, recent_LE: float64, tokens of recent snapshots per rank and per logical expert.
    tokens_ALE: int64, routed tokens since the start; rank_tokens_LR: int64, by rank; busiest_tokens: by
    placement, those of each layer's busiest rank, layers summed.
    """

    def __init__(self, contiguous: Placement) -> None:
        layers, experts = contiguous.num_layers, contiguous.num_experts
        self.served, self.contiguous = RecentImbalance(layers), RecentImbalance(layers)
        self.phases = {phase: RecentImbalance(layers) for phase in PHASES}
        self.recent_LR = np.zeros((layers, contiguous.num_ranks))
        self.recent_LE = np.zeros((layers, experts))
        self.tokens_ALE = np.zeros((len(PHASES), layers, experts), dtype=np.int64)
        self.rank_tokens_LR = np.zeros((layers, contiguous.num_ranks), dtype=np.int64)
        self.busiest_tokens = {"served": 0, "contiguous": 0}
        self._served, self._loaded = (_Slots.of(Served.initial(contiguous)) for _ in range(2))
        self.add(self.tokens_ALE.copy(), Served.initial(contiguous))  # compiled before any step

    def add(self, counts_ALE: NDArray[np.int64], served: Served) -> None:
        """One snapshot with tokens, that `served` computed."""
        if self._served.served is not served:
            self._served = _Slots.of(served)
        by_phase_ALR = self._served.rank_load(counts_ALE)
        served_LR = by_phase_ALR.sum(axis=0)
        load_LE = counts_ALE.sum(axis=0)
        self.busiest_tokens["served"] += self.served.add(served_LR)
        self.busiest_tokens["contiguous"] += self.contiguous.add(
            self._loaded.rank_load(load_LE[None])[0]
        )
        for phase, rank_load_LR in zip(self.phases.values(), by_phase_ALR, strict=True):
            phase.add(rank_load_LR)
        self.tokens_ALE += counts_ALE
        for recent, load in ((self.recent_LE, load_LE), (self.recent_LR, served_LR)):
            recent *= _FADE
            recent += load
        self.rank_tokens_LR += np.rint(served_LR).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """What is served, in arrays of its own: machine code depends on who may write to an array."""

    served: Served
    slots_LP: NDArray[np.int64]
    quotas_LP: NDArray[np.float64]

    @classmethod
    def of(cls, served: Served) -> _Slots:
        return cls(served, served.placement.slots_LP.astype(np.int64), served.quotas_LP.copy())

    def rank_load(self, counts_ALE: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [A, L, R]."""
        ranks = self.served.placement.num_ranks
        return _rank_load_ALR(counts_ALE, self.slots_LP, self.quotas_LP, ranks)


@compiled
def _rank_load_ALR(
    counts_ALE: NDArray[np.int64],
    slots_LP: NDArray[np.int64],
    quotas_LP: NDArray[np.float64],
    ranks: int,
) -> NDArray[np.float64]:
    phases, layers, _ = counts_ALE.shape
    slots = slots_LP.shape[1] // ranks
    load_ALR = np.zeros((phases, layers, ranks))
    for phase in range(phases):
        for layer in range(layers):
            for rank in range(ranks):
                tokens = 0.0
                for slot in range(rank * slots, rank * slots + slots):
                    expert = slots_LP[layer, slot]
                    tokens += counts_ALE[phase, layer, expert] * quotas_LP[layer, slot]
                load_ALR[phase, layer, rank] = tokens
    return load_ALR


@compiled
def _add_recent(
    sums_2L: NDArray[np.float64], rank_load_LR: NDArray[np.float64], fade: float
) -> float:
    if not rank_load_LR.any():
        return 0.0
    layers, ranks = rank_load_LR.shape
    total = 0.0
    for layer in range(layers):
        busiest = rank_load_LR[layer].max()
        sums_2L[0, layer] = fade * sums_2L[0, layer] + busiest
        sums_2L[1, layer] = fade * sums_2L[1, layer] + rank_load_LR[layer].sum() / ranks
        total += busiest
    return total
