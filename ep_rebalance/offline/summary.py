"""Summary: what a trace holds, in one pass and in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ep_rebalance.load.trace import Record, RecordedPlacement, TraceHead
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.step_time import RankLoad, recorded_by_own_counts
from ep_rebalance.placement import imbalance_L

_HOTTEST, _WORST = 5, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a trace holds.

    idle_snapshots: snapshots without tokens.
    began, ended: Unix times of the first and last snapshot.
    tokens: by phase; each token counts once.
    step_seconds: mean step.
    generations: (generation, the engine's step from which it was served).
    imbalance: max over mean rank load of what was served, averaged over layers.
    worst_layers: (layer, its max over mean rank load), the worst first.
    hottest: (layer, expert, its load over the layer's mean), the hottest first.
    """

    snapshots: int
    idle_snapshots: int
    steps: int
    began: float
    ended: float
    tokens: dict[str, int]
    step_seconds: float
    generations: list[tuple[int, int]]
    imbalance: float
    worst_layers: list[tuple[int, float]]
    hottest: list[tuple[int, int, float]]


def summarise(head: TraceHead, records: Iterable[Record]) -> Summary:
    """Sum up a trace. Raises what reading the records raises."""
    tokens_ALE = np.zeros((len(PHASES), head.layers, head.experts), dtype=np.int64)
    weighted_L, pairs_L = np.zeros(head.layers), np.zeros(head.layers)
    generations: list[tuple[int, int]] = []
    snapshots = idle = steps = 0
    began = ended = seconds = 0.0
    served: RecordedPlacement | None = None
    by_own_counts = recorded_by_own_counts(head)
    for record in records:
        if isinstance(record, RecordedPlacement):
            if served is None or record.placement != served.placement:
                generations.append((record.generation, record.step))
            served = record
            continue
        snapshots, steps = snapshots + 1, steps + record.steps
        began, ended = began or record.time, record.time
        seconds += record.steps * record.step_seconds
        idle += not record.counts_ALE.any()
        tokens_ALE += record.counts_ALE
        if served is not None:
            load_LE = record.counts_ALE.sum(axis=0, dtype=np.int64)
            loads_LR = RankLoad.of(
                load_LE, served.placement, served.quotas_LP, by_own_counts=by_own_counts
            ).tokens_LR
            weighted_L += imbalance_L(loads_LR) * loads_LR.sum(axis=1)
            pairs_L += loads_LR.sum(axis=1)
    mean_L = np.where(pairs_L > 0, weighted_L / np.maximum(pairs_L, 1.0), 1.0)
    load_LE = tokens_ALE.sum(axis=0)
    share_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-300)
    numbers = head.layer_numbers
    hottest = np.argsort(share_LE, axis=None)[::-1][:_HOTTEST]
    return Summary(
        snapshots=snapshots,
        idle_snapshots=idle,
        steps=steps,
        began=began,
        ended=ended,
        tokens={
            phase: int(count) // (head.top_k * head.layers)
            for phase, count in zip(PHASES, tokens_ALE.sum(axis=(1, 2)), strict=True)
        },
        step_seconds=seconds / max(steps, 1),
        generations=generations,
        imbalance=float(mean_L.mean()),
        worst_layers=[(numbers[i], float(mean_L[i])) for i in np.argsort(mean_L)[::-1][:_WORST]],
        hottest=[
            (numbers[i // head.experts], int(i % head.experts), float(share_LE.ravel()[i]))
            for i in hottest
        ],
    )
