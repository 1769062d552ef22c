"""Overview: what the page at `GET /ep_rebalance/` shows, small enough to be fetched every few seconds.

The load of every expert (`load_report.py`) takes hundreds of kilobytes for a large model, so this holds
only the hottest experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.metrics import Status

HOTTEST = 24
MOST_COLUMNS = 256
"""Of the map of ranks. More would hardly be seen, and would take milliseconds of an engine step to encode."""


class HotExpert(msgspec.Struct, frozen=True, kw_only=True):
    """One logical expert.

    layer: its number in the engine's model.
    load: its recent tokens over the mean of its layer's experts.
    ranks: the EP ranks that hold a replica.
    """

    layer: int
    expert: int
    load: float
    ranks: list[int]


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The status, and where the load is.

    rank_load: [L][columns]. Recent tokens of a rank over the mean of its layer; [] before the first tokens.
    ranks_per_column: neighbouring ranks of which a column of `rank_load` has the busiest; 1 up to 256 ranks.
    hottest: the hottest expert first; [] before the first tokens.
    drafter: the same of its drafter; None if that has no experts.
    """

    status: Status
    rank_load: list[list[float]]
    hottest: list[HotExpert]
    ranks_per_column: int = 1
    drafter: Overview | None = None


def overview(
    status: Status,
    recent_LR: NDArray[np.float64],
    recent_LE: NDArray[np.float64],
    placement: Placement,
) -> Overview:
    """The overview that goes with a status.

    recent_LR: float64 [L, R], tokens. In recent snapshots, as `imbalance.py` weighs them.
    recent_LE: float64 [L, E], tokens. In recent snapshots.
    """
    seen = bool(recent_LE.any())
    ranks = recent_LR.shape[1]
    per_column = -(-ranks // MOST_COLUMNS)
    busiest_LX = np.maximum.reduceat(_over_mean(recent_LR), np.arange(0, ranks, per_column), axis=1)
    return Overview(
        status=status,
        rank_load=busiest_LX.round(3).tolist() if seen else [],
        ranks_per_column=per_column,
        hottest=_hottest(_over_mean(recent_LE), placement, status.moe_layers) if seen else [],
    )


def _over_mean(load_LX: NDArray[np.float64]) -> NDArray[np.float64]:
    mean_L1 = load_LX.mean(axis=1, keepdims=True)
    ratio: NDArray[np.float64] = load_LX / np.where(mean_L1 > 0, mean_L1, 1.0)
    return ratio


def _hottest(
    load_LE: NDArray[np.float64], placement: Placement, moe_layers: list[int]
) -> list[HotExpert]:
    count = min(HOTTEST, load_LE.size)
    # The others need not be sorted.
    cells = np.argpartition(-load_LE.ravel(), count - 1)[:count]
    layers, experts = np.unravel_index(cells, load_LE.shape)
    found = [
        HotExpert(
            layer=moe_layers[layer],
            expert=int(expert),
            load=round(float(load_LE[layer, expert]), 2),
            ranks=_ranks_of(placement, layer, expert),
        )
        for layer, expert in zip(layers, experts, strict=True)
    ]
    return hottest_first(found)


def hottest_first(experts: Iterable[HotExpert]) -> list[HotExpert]:
    """In their order; equally hot ones by layer and number."""
    return sorted(experts, key=lambda hot: (-hot.load, hot.layer, hot.expert))


def _ranks_of(placement: Placement, layer: np.intp, expert: np.intp) -> list[int]:
    slots = np.flatnonzero(placement.slots_LP[layer] == expert)
    return sorted(set(placement.rank_of(slots).tolist()))
