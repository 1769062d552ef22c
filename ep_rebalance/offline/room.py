"""Room for improvement: whether ranks are uneven, whether placing the experts helps, and whether it lasts.

Hot experts may share a rank with cold ones, and then nothing is to be gained although experts are uneven.
And a placement helps only if the load that comes is like the load it was made for: so each part of a
recording is also scored on the placement that was made from the part before it. All by token counts, with
one slot for each expert.

Letters of this module: `W` parts of the recording; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.recording import Recording
from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology

_HOT = 2.0
"""An expert with this many times the mean load of its layer is called hot."""
_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class HotExpert:
    """An expert that is hot in every part of the recording.

    layer: its number in the model.
    times_mean: its load over the mean of its layer.
    """

    layer: int
    expert: int
    times_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What placing the experts could gain on some ranks. Imbalances are max over mean rank load, both summed
    over layers; 1 is even.

    phase: of PHASES; None for all tokens.
    ranks: EP ranks.
    parts: of the recording.
    loaded: imbalance as the engine loads the experts (contiguous).
    placed: with the best placement found for the same tokens; no server can know them before.
    hottest: the hottest expert's load over a rank's mean load, averaged over layers.
    next_loaded, next_placed, next_bound: as `loaded`, with each part on the placement made from the part
        before it, and with each part on its own; None if there is one part.
    hot: how many experts are hot over the whole recording.
    always_hot: how many of these are hot in every part.
    hottest_experts: the hottest of those that always are.
    """

    phase: str | None
    ranks: int
    parts: int
    loaded: float
    placed: float
    hottest: float
    next_loaded: float | None
    next_placed: float | None
    next_bound: float | None
    hot: int
    always_hot: int
    hottest_experts: tuple[HotExpert, ...]

    @property
    def kept(self) -> float | None:
        """What a placement gains on the next part, as a fraction of what one made for it would; None if that
        is nothing or not known.
        """
        if self.next_loaded is None or self.next_placed is None or self.next_bound is None:
            return None
        possible = self.next_loaded - self.next_bound
        return (self.next_loaded - self.next_placed) / possible if possible > 1e-3 else None


def room_on(
    head: TraceHead,
    recording: Recording,
    topology: Topology,
    phase: str | None = None,
    *,
    in_parts: bool = True,
) -> Room:
    """What there is to gain on these ranks.

    phase: whose tokens count; None for all.
    in_parts: whether to look at the parts of the recording, or at all of it alone.
    """
    load_WLE = recording.load_WLE(phase)
    load_WLE = load_WLE[load_WLE.any(axis=(1, 2))]
    if not in_parts:
        load_WLE = load_WLE.sum(axis=0, keepdims=True)
    ranks, parts = topology.num_ranks, len(load_WLE)
    contiguous = Placement.contiguous(
        num_layers=head.layers,
        num_experts=head.experts,
        num_ranks=ranks,
        num_redundant=-head.experts % ranks,
    )
    total_LE = load_WLE.sum(axis=0)
    made = [_placed(load_LE, contiguous, topology) for load_LE in load_WLE] if parts > 1 else []
    later = load_WLE[1:]
    pairs = list(zip(made[:-1], later, strict=True))
    own = list(zip(made[1:], later, strict=True))
    share_WLE = _over_mean(load_WLE)
    hot_LE = _over_mean(total_LE[None])[0]
    always_LE = (share_WLE >= _HOT).all(axis=0) & (hot_LE >= _HOT)
    return Room(
        phase=phase,
        ranks=ranks,
        parts=parts,
        loaded=_imbalance([(contiguous, total_LE)]),
        placed=_imbalance([(_placed(total_LE, contiguous, topology), total_LE)]),
        hottest=float((total_LE.max(axis=1) * ranks / _at_least(total_LE.sum(axis=1))).mean()),
        next_loaded=_imbalance([(contiguous, load_LE) for load_LE in later]) if pairs else None,
        next_placed=_imbalance(pairs) if pairs else None,
        next_bound=_imbalance(own) if own else None,
        hot=int((hot_LE >= _HOT).sum()),
        always_hot=int(always_LE.sum()),
        hottest_experts=_hottest(head, hot_LE, always_LE),
    )


def _hottest(
    head: TraceHead, hot_LE: NDArray[np.float64], always_LE: NDArray[np.bool_]
) -> tuple[HotExpert, ...]:
    order = np.argsort(np.where(always_LE, hot_LE, 0.0), axis=None)[::-1][:_LISTED]
    found = [np.unravel_index(place, hot_LE.shape) for place in order]
    return tuple(
        HotExpert(
            layer=head.layer_numbers[int(layer)],
            expert=int(expert),
            times_mean=float(hot_LE[layer, expert]),
        )
        for layer, expert in found
        if always_LE[layer, expert]
    )


def _placed(load_LE: NDArray[np.integer], contiguous: Placement, topology: Topology) -> Placement:
    window = WindowLoad(
        tokens_WLE=load_LE[None].astype(np.float64), weight_W=np.ones(1), steps_W=np.ones(1)
    )
    return place_anew(window, contiguous, topology)


def _imbalance(served: Sequence[tuple[Placement, NDArray[np.integer]]]) -> float:
    """Max over mean rank load, both summed over layers and pairs."""
    loads_LR = [placement.rank_load_LR(load_LE) for placement, load_LE in served]
    busiest = sum(float(load_LR.max(axis=1).sum()) for load_LR in loads_LR)
    return busiest / max(sum(float(load_LR.mean(axis=1).sum()) for load_LR in loads_LR), 1e-300)


def _over_mean(load_WLE: NDArray[np.integer]) -> NDArray[np.float64]:
    """Load over the layer's mean."""
    share: NDArray[np.float64] = load_WLE / _at_least(load_WLE.mean(axis=2, keepdims=True))
    return share


def _at_least(load: NDArray[np.floating | np.integer]) -> NDArray[np.float64]:
    """For a division: layers without tokens have none above the line either."""
    return np.maximum(load.astype(np.float64), 1e-300)
