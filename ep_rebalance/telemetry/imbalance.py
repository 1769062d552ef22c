"""Rank balance: how evenly the EP ranks were loaded lately, and would have been without rebalancing.

A snapshot with few tokens says little. Imbalance is therefore that of recent snapshots taken together:
each weighs as much as its tokens, and older ones fade. All of it is one compiled pass, which runs in a thread
beside the engine's steps: it takes milliseconds for a thousand ranks.

Letters of this module: `K` kinds of imbalance (as served, as loaded, then as served in each phase); others
as in `placement.py`.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.load.window import PHASES
from ep_rebalance.migration.served import Served, ServedTokens
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import pour_step, sum_ranks

logger = logging.getLogger(__name__)

HALF_LIFE_SNAPSHOTS = 4
"""A snapshot counts half once this many more with tokens have followed."""

_FADE = 0.5 ** (1 / HALF_LIFE_SNAPSHOTS)
_SERVED, _CONTIGUOUS, _PHASES = 0, 1, 2
_WAITING = 8
"""Snapshots that may wait to be added; the next one waits for room."""


@dataclass(frozen=True, slots=True, eq=False)
class RecentImbalance:
    """Sums over recent snapshots.

    busiest_L: float64 [L], tokens. On the busiest rank of each snapshot.
    mean_L: float64 [L], tokens. On a rank on average.
    """

    busiest_L: NDArray[np.float64]
    mean_L: NDArray[np.float64]

    def of_layers(self) -> list[float]:
        """Max over mean of each layer: 1 where it saw no tokens. Empty before the first tokens."""
        if not self.mean_L.any():
            return []
        safe_L = np.where(self.mean_L > 0, self.mean_L, 1.0)
        ratios: list[float] = np.where(self.mean_L > 0, self.busiest_L / safe_L, 1.0).tolist()
        return ratios

    def overall(self) -> float | None:
        """Max over mean, both summed over the layers, because a step waits in every one of them; None
        before the first tokens.
        """
        mean = self.mean_L.sum()
        return float(self.busiest_L.sum() / mean) if mean else None


class RankBalance:
    """What the snapshots of one model add up to.

    by_own_counts: whether each step's own tokens are spread evenly over the replicas. A snapshot then counts
        as one step, since it does not tell how its steps were split; else its tokens went by the quotas.

    served: recent imbalance as served.
    contiguous: the same for the placement that the engine loaded, had it stayed.
    phases: recent imbalance as served, by phase; a phase without tokens in a snapshot does not fade.
    recent_LR: float64 [L, R], tokens. In recent snapshots.
    recent_LE: float64 [L, E], tokens. In recent snapshots.
    tokens_ALE: int64 [A, L, E], tokens. Routed since the start.
    rank_tokens_LR: int64 [L, R], tokens. Computed since the start.
    busiest_tokens: tokens of each layer's busiest rank since the start, summed over the layers; as
        served and as loaded.
    """

    def __init__(self, contiguous: Placement, *, by_own_counts: bool = False) -> None:
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
        busiest_KL, mean_KL = np.zeros((2, _PHASES + len(PHASES), layers))
        kinds = [RecentImbalance(*rows) for rows in zip(busiest_KL, mean_KL, strict=True)]
        self.served, self.contiguous = kinds[_SERVED], kinds[_CONTIGUOUS]
        self.phases = dict(zip(PHASES, kinds[_PHASES:], strict=True))
        self._sums = _Sums(
            self.tokens_ALE,
            self.recent_LE,
            self.recent_LR,
            self.rank_tokens_LR,
            busiest_KL,
            mean_KL,
        )
        self._by_own_counts = by_own_counts
        loaded = Served.initial(contiguous)
        self._served, self._served_slots = loaded, _Slots.of(loaded)
        self._loaded_slots = self._served_slots
        self.add(self.tokens_ALE.copy(), loaded)  # no tokens: it is only compiled, before any step

    def add(
        self,
        counts_ALE: NDArray[np.int64],
        served: Served,
        earlier: ServedTokens | None = None,
    ) -> None:
        """Add a snapshot.

        counts_ALE: int64 [A, L, E], tokens. Routed while `served` was served.
        earlier: tokens of the same snapshot that something else served; None if there are none.
        """
        fade_K = np.full(len(self._sums.busiest_KL), _FADE)
        if earlier is not None:
            self._add_part(earlier.counts_ALE, earlier.served, fade_K)
            # What has faded for the first part of a snapshot does not fade for the second.
            seen_A = earlier.counts_ALE.any(axis=(1, 2))
            fade_K[_PHASES:][seen_A] = 1.0
            fade_K[:_PHASES] = 1.0
        self._add_part(counts_ALE, served, fade_K)

    def _add_part(
        self, counts_ALE: NDArray[np.int64], served: Served, fade_K: NDArray[np.float64]
    ) -> None:
        if self._served is not served:
            self._served, self._served_slots = served, _Slots.of(served)
        busiest_served, busiest_contiguous = _add_snapshot(
            counts_ALE,
            self._served_slots,
            self._loaded_slots,
            self._by_own_counts,
            self._sums,
            fade_K,
        )
        self.busiest_tokens["served"] += round(busiest_served)
        self.busiest_tokens["contiguous"] += round(busiest_contiguous)


_Snapshot = tuple[NDArray[np.int64], Served, ServedTokens | None]
"""The arguments of `RankBalance.add`."""


class BalanceThread:
    """Adds snapshots to `balance`, in their order, in a thread of its own.

    failed: snapshots that could not be added.
    """

    def __init__(self, balance: RankBalance) -> None:
        self.failed = 0
        self._balance = balance
        self._waiting: queue.Queue[_Snapshot] = queue.Queue(_WAITING)
        threading.Thread(target=self._add, name="ep_rebalance balance", daemon=True).start()

    def add(
        self,
        counts_ALE: NDArray[np.int64],
        served: Served,
        earlier: ServedTokens | None = None,
    ) -> None:
        """As `RankBalance.add`, later. The counts must stay as they are."""
        self._waiting.put((counts_ALE, served, earlier))

    def caught_up(self) -> RankBalance:
        """The balance, once all snapshots have been added."""
        self._waiting.join()
        return self._balance

    def _add(self) -> None:
        while True:
            snapshot = self._waiting.get()
            try:
                self._balance.add(*snapshot)
            except BaseException:  # a thread that ends would be waited for in vain
                self.failed += 1
                logger.exception("ep_rebalance: a snapshot is missing in the metrics")
            finally:
                self._waiting.task_done()


class _Slots(NamedTuple):
    """A placement and its quotas in writable arrays of their own.

    first_R1: int64 [R + 1]. `Placement.first_slots_R1`.

    Numba compiles another variant for read-only arrays, and would do so while the engine serves.
    """

    slots_LP: NDArray[np.uint32]
    quotas_LP: NDArray[np.float64]
    first_R1: NDArray[np.int64]

    @classmethod
    def of(cls, served: Served) -> _Slots:
        placement = served.placement
        return cls(
            placement.slots_LP.astype(np.uint32),
            served.quotas_LP.copy(),
            placement.first_slots_R1,
        )


class _Sums(NamedTuple):
    """What a snapshot is added to, in place; the arrays of `RankBalance`.

    busiest_KL, mean_KL: float64 [K, L]. `RecentImbalance` of each kind.
    """

    tokens_ALE: NDArray[np.int64]
    recent_LE: NDArray[np.float64]
    recent_LR: NDArray[np.float64]
    rank_tokens_LR: NDArray[np.int64]
    busiest_KL: NDArray[np.float64]
    mean_KL: NDArray[np.float64]


@compiled
def _add_snapshot(
    counts_ALE: NDArray[np.int64],
    served: _Slots,
    loaded: _Slots,
    by_own_counts: bool,
    sums: _Sums,
    fade_K: NDArray[np.float64],
) -> tuple[float, float]:
    """Add a snapshot layer by layer, while each is in the cache.

    by_own_counts: the served split is poured for the snapshot's own load.
    fade_K: float64 [K]. The part of what was seen before that still counts; that of the first also holds for
        the recent loads.
    Returns the tokens of the busiest ranks in this snapshot, summed over layers, as served and as
    loaded.
    """
    tokens_ALE, recent_LE, recent_LR, rank_tokens_LR, busiest_KL, mean_KL = sums
    slots_LP, quotas_LP, first_R1 = served
    loaded_LP, loaded_quotas_LP, loaded_first_R1 = loaded
    phases, layers, experts = counts_ALE.shape
    kinds, ranks = len(busiest_KL), recent_LR.shape[1]
    load_E, load_KR = np.empty(experts), np.zeros((kinds, ranks))
    new_busiest_KL, new_mean_KL = np.empty((kinds, layers)), np.empty((kinds, layers))
    quotas_P = np.empty(quotas_LP.shape[1])
    for layer in range(layers):
        load_E[:] = 0.0
        load_KR[_SERVED] = 0.0
        for phase in range(phases):
            for expert in range(experts):
                tokens_ALE[phase, layer, expert] += counts_ALE[phase, layer, expert]
                load_E[expert] += counts_ALE[phase, layer, expert]
        quotas_P[:] = quotas_LP[layer]
        if by_own_counts:
            pour_step(load_E, slots_LP[layer], first_R1, quotas_P)
        for phase in range(phases):
            counts_E = counts_ALE[phase, layer]
            sum_ranks(counts_E, slots_LP[layer], quotas_P, first_R1, load_KR[_PHASES + phase])
            # Ranks' loads are linear in the tokens, so those of the phases add up.
            load_KR[_SERVED] += load_KR[_PHASES + phase]
        sum_ranks(
            load_E,
            loaded_LP[layer],
            loaded_quotas_LP[layer],
            loaded_first_R1,
            load_KR[_CONTIGUOUS],
        )
        _fade_in(recent_LE[layer], load_E, fade_K[_SERVED])
        _fade_in(recent_LR[layer], load_KR[_SERVED], fade_K[_SERVED])
        for rank in range(ranks):
            rank_tokens_LR[layer, rank] += round(load_KR[_SERVED, rank])
        for kind in range(kinds):
            new_busiest_KL[kind, layer] = load_KR[kind].max()
            new_mean_KL[kind, layer] = load_KR[kind].sum() / ranks
    for kind in range(kinds):
        if new_mean_KL[kind].any():
            _fade_in(busiest_KL[kind], new_busiest_KL[kind], fade_K[kind])
            _fade_in(mean_KL[kind], new_mean_KL[kind], fade_K[kind])
    return new_busiest_KL[_SERVED].sum(), new_busiest_KL[_CONTIGUOUS].sum()


@compiled
def _fade_in(recent_X: NDArray[np.float64], newest_X: NDArray[np.float64], fade: float) -> None:
    for index in range(len(recent_X)):
        recent_X[index] = fade * recent_X[index] + newest_X[index]
