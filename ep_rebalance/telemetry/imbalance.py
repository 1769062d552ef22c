"""Rank balance: how evenly the EP ranks were loaded lately, and would have been without rebalancing.

One snapshot says little when it holds few tokens. Imbalance is therefore that of recent snapshots
together, each weighing what its tokens weigh; older ones fade. All of it is one compiled pass, since
it happens between two engine steps.

Letters: `K` kinds of imbalance: as served, as loaded (contiguous), then as served by phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.load.window import PHASES
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement

HALF_LIFE_SNAPSHOTS = 4
"""Snapshots with tokens after which one counts half."""

_FADE = 0.5 ** (1 / HALF_LIFE_SNAPSHOTS)
_SERVED, _CONTIGUOUS, _PHASES = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class RecentImbalance:
    """busiest_L, mean_L: float64, tokens of the busiest rank and of the mean rank, summed over recent
    snapshots."""

    busiest_L: NDArray[np.float64]
    mean_L: NDArray[np.float64]

    def of_layers(self) -> list[float]:
        """Max over mean per layer; 1 where a layer saw no tokens, [] before the first tokens."""
        if not self.mean_L.any():
            return []
        safe_L = np.where(self.mean_L > 0, self.mean_L, 1.0)
        ratios: list[float] = np.where(self.mean_L > 0, self.busiest_L / safe_L, 1.0).tolist()
        return ratios

    def overall(self) -> float | None:
        """Max summed over layers over mean summed over layers: layers wait one after the other."""
        mean = self.mean_L.sum()
        return float(self.busiest_L.sum() / mean) if mean else None


class RankBalance:
    """What snapshots add up to, for one model.

    served, contiguous: as served, and as the placement that the engine loaded would have had it.
    phases: as served, each phase alone; one without tokens in a snapshot does not fade.
    recent_LR, recent_LE: float64, tokens of recent snapshots per rank and per logical expert.
    tokens_ALE: int64, routed tokens since the start; rank_tokens_LR: int64, by rank; busiest_tokens: by
    placement, those of each layer's busiest rank, layers summed.
    """

    def __init__(self, contiguous: Placement) -> None:
        layers, experts, ranks = (
            contiguous.num_layers,
            contiguous.num_experts,
            contiguous.num_ranks,
        )
        self.recent_LR = np.zeros((layers, ranks))
        self.recent_LE = np.zeros((layers, experts))
        self.tokens_ALE = np.zeros((len(PHASES), layers, experts), dtype=np.int64)
        self.rank_tokens_LR = np.zeros((layers, ranks), dtype=np.int64)
        self.busiest_tokens = {"served": 0, "contiguous": 0}
        self._busiest_KL, self._mean_KL = np.zeros((2, _PHASES + len(PHASES), layers))
        kinds = [
            RecentImbalance(*rows) for rows in zip(self._busiest_KL, self._mean_KL, strict=True)
        ]
        self.served, self.contiguous = kinds[_SERVED], kinds[_CONTIGUOUS]
        self.phases = dict(zip(PHASES, kinds[_PHASES:], strict=True))
        self._served = self._loaded = _Slots.of(Served.initial(contiguous))
        self.add(self.tokens_ALE.copy(), self._loaded.served)  # compiled before any step

    def add(self, counts_ALE: NDArray[np.int64], served: Served) -> None:
        """One snapshot with tokens, that `served` computed."""
        if self._served.served is not served:
            self._served = _Slots.of(served)
        busiest_served, busiest_contiguous = _add_snapshot(
            counts_ALE,
            self._served.slots_LP,
            self._served.quotas_LP,
            self._loaded.slots_LP,
            self._loaded.quotas_LP,
            self.tokens_ALE,
            self.recent_LE,
            self.recent_LR,
            self.rank_tokens_LR,
            self._busiest_KL,
            self._mean_KL,
        )
        self.busiest_tokens["served"] += round(busiest_served)
        self.busiest_tokens["contiguous"] += round(busiest_contiguous)


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """What is served, in arrays of its own: machine code depends on who may write to an array."""

    served: Served
    slots_LP: NDArray[np.uint32]
    quotas_LP: NDArray[np.float64]

    @classmethod
    def of(cls, served: Served) -> _Slots:
        return cls(served, served.placement.slots_LP.astype(np.uint32), served.quotas_LP.copy())


@compiled
def _add_snapshot(
    counts_ALE: NDArray[np.int64],
    slots_LP: NDArray[np.uint32],
    quotas_LP: NDArray[np.float64],
    loaded_LP: NDArray[np.uint32],
    loaded_quotas_LP: NDArray[np.float64],
    tokens_ALE: NDArray[np.int64],
    recent_LE: NDArray[np.float64],
    recent_LR: NDArray[np.float64],
    rank_tokens_LR: NDArray[np.int64],
    busiest_KL: NDArray[np.float64],
    mean_KL: NDArray[np.float64],
) -> tuple[float, float]:
    """Layer by layer, while it is in the cache. Returns the busiest ranks' tokens of this snapshot, as
    served and as loaded."""
    phases, layers, experts = counts_ALE.shape
    kinds, ranks = len(busiest_KL), recent_LR.shape[1]
    load_E, load_KR = np.empty(experts), np.zeros((kinds, ranks))
    new_busiest_KL, new_mean_KL = np.empty((kinds, layers)), np.empty((kinds, layers))
    for layer in range(layers):
        load_E[:] = 0.0
        load_KR[_SERVED] = 0.0
        for phase in range(phases):
            counts_E = counts_ALE[phase, layer]
            for expert in range(experts):
                tokens_ALE[phase, layer, expert] += counts_E[expert]
                load_E[expert] += counts_E[expert]
            _sum_ranks(counts_E, slots_LP[layer], quotas_LP[layer], load_KR[_PHASES + phase])
            load_KR[_SERVED] += load_KR[_PHASES + phase]
        _sum_ranks(load_E, loaded_LP[layer], loaded_quotas_LP[layer], load_KR[_CONTIGUOUS])
        _fade_in(recent_LE[layer], load_E)
        _fade_in(recent_LR[layer], load_KR[_SERVED])
        for rank in range(ranks):
            rank_tokens_LR[layer, rank] += round(load_KR[_SERVED, rank])
        for kind in range(kinds):
            new_busiest_KL[kind, layer] = load_KR[kind].max()
            new_mean_KL[kind, layer] = load_KR[kind].sum() / ranks
    for kind in range(kinds):
        if new_mean_KL[kind].any():
            _fade_in(busiest_KL[kind], new_busiest_KL[kind])
            _fade_in(mean_KL[kind], new_mean_KL[kind])
    return new_busiest_KL[_SERVED].sum(), new_busiest_KL[_CONTIGUOUS].sum()


@compiled
def _sum_ranks(
    load_E: NDArray[np.float64] | NDArray[np.int64],
    slots_P: NDArray[np.uint32],
    quotas_P: NDArray[np.float64],
    load_R: NDArray[np.float64],
) -> None:
    slots = len(slots_P) // len(load_R)
    for rank in range(len(load_R)):
        tokens = 0.0
        for slot in range(rank * slots, (rank + 1) * slots):
            tokens += load_E[slots_P[slot]] * quotas_P[slot]
        load_R[rank] = tokens


@compiled
def _fade_in(recent_X: NDArray[np.float64], newest_X: NDArray[np.float64]) -> None:
    for index in range(len(recent_X)):
        recent_X[index] = _FADE * recent_X[index] + newest_X[index]
