"""Expert load: the tokens of every logical expert since the engine started, and where it is served.

The answer to `GET /ep_rebalance/load`: it shows hot experts without a time series for each of them.
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

    layer: its number in the engine's model.
    tokens: E numbers for each phase, tokens. A token counts once for each of its experts.
    slots: P numbers. The logical expert in each slot, rank by rank: equally many on each, but for mode
        observe, in which the first ranks have one more each if some are left over.
    quotas: P numbers. The share of its expert's tokens that each slot receives.
    """

    layer: int
    tokens: dict[str, list[int]]
    slots: list[int]
    quotas: list[float]


class ExpertLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The whole model.

    started: Unix time at which counting began.
    generation: of the placement that is served.
    drafter: the same of its drafter; None if that has no experts.
    """

    model: str
    started: float
    generation: int
    ep_size: int
    layers: list[LayerLoad]
    drafter: ExpertLoad | None = None


def expert_load(status: Status, tokens_ALE: NDArray[np.int64], served: Served) -> ExpertLoad:
    """The load of all experts.

    tokens_ALE: int64 [A, L, E], tokens. Counted since `status.started`.
    """
    layers = [
        LayerLoad(
            layer=number,
            tokens={
                phase: tokens_LE[layer].tolist()
                for phase, tokens_LE in zip(PHASES, tokens_ALE, strict=True)
            },
            slots=served.placement.slots_LP[layer].tolist(),
            quotas=served.quotas_LP[layer].tolist(),
        )
        for layer, number in enumerate(status.moe_layers)
    ]
    return ExpertLoad(
        model=status.model,
        started=status.started,
        generation=served.generation,
        ep_size=status.ep_size,
        layers=layers,
    )
