"""Expert load: what every logical expert got since the start of the engine, and where it is served.

Answers `GET /ep_rebalance/load`: hot experts can be seen without a time series for each of them.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import PHASES
from ep_rebalance.migration.served import Served
from ep_rebalance.telemetry.metrics import Status


class LayerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer.

    tokens: by phase, the tokens that each logical expert got; a token counts once for each of its
    experts. slots: the logical expert in each slot, rank after rank. quotas: part of its expert's
    tokens that each slot receives.
    """

    tokens: dict[str, list[int]]
    slots: list[int]
    quotas: list[float]


class ExpertLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The whole model. started: Unix time at which counting began. generation: of the placement."""

    model: str
    started: float
    generation: int
    ep_size: int
    layers: list[LayerLoad]


def expert_load(status: Status, tokens_ALE: NDArray[np.int64], served: Served) -> ExpertLoad:
    """tokens_ALE: int64 [A, L, E], counted since `status.started`, `A` in the order of PHASES."""
    layers = [
        LayerLoad(
            tokens={
                phase: tokens_LE[layer].tolist()
                for phase, tokens_LE in zip(PHASES, tokens_ALE, strict=True)
            },
            slots=served.placement.slots_LP[layer].tolist(),
            quotas=served.quotas_LP[layer].tolist(),
        )
        for layer in range(served.placement.num_layers)
    ]
    return ExpertLoad(
        model=status.model,
        started=status.started,
        generation=served.generation,
        ep_size=status.ep_size,
        layers=layers,
    )
