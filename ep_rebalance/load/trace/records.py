"""What a trace holds: a head, then snapshots and the placements that they were served with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.snapshot import NOTHING_AGREED, Agreed, Snapshot
from ep_rebalance.load.window import LoadSample
from ep_rebalance.placement import Placement

FORMAT = "ep-rebalance-trace"
FORMAT_VERSION = 2
"""Version 1 does not record what an operator asked for, what was abandoned and what was reloaded."""


class TraceHead(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded, where and by what.

    layers: MoE layers.
    experts: logical experts of a layer.
    top_k: experts per token.
    ep_size: number of EP ranks.
    slots: slots of a layer, on all ranks.
    node_of_rank: ep_size numbers.
    moe_layers: a rising number for each layer, which it has in the engine's model; [] if unknown.
    bytes_per_second, round_seconds: of the links, see `Topology`; [] if unknown.
    expert_bytes: a size for each layer, bytes. One expert; 0 if unknown.
    hidden_size: columns of the hidden states; 0 if unknown.
    started: Unix time.
    config: the plugin's settings.
    origin: where the load comes from, if no server was recorded; else "".
    """

    model: str
    layers: int
    experts: int
    top_k: int
    ep_size: int
    slots: int
    node_of_rank: list[int]
    expert_bytes: list[int]
    hidden_size: int
    engine: str
    plugin_version: str
    started: float
    config: dict[str, Any]
    origin: str = ""
    bytes_per_second: list[float] = []
    round_seconds: float = 0.0
    moe_layers: list[int] = []
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def layer_numbers(self) -> list[int]:
        """A number for each layer: its own in the engine's model, or else from 0 on."""
        return self.moe_layers or list(range(self.layers))


@dataclass(frozen=True, slots=True)
class MigrationEnd:
    """How a migration ended.

    batches: how many were committed.
    abandoned: whether a fault ended it before the last one.
    """

    batches: int
    abandoned: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedSnapshot:
    """One snapshot as the server saw it.

    counts_ALE: [A, L, E], tokens. See `LoadSample`; uint32 in the file.
    step: the engine's number of its last step.
    steps, step_seconds: see `LoadSample`.
    time: Unix time.
    generation: of the placement that was served.
    agreed: what the ranks learned with it.
    ended: the migration that ended since the previous snapshot; None if none did.

    Raises ValueError for a step time that is not finite or below 0, and for steps below 0.
    """

    counts_ALE: NDArray[np.uint32] | NDArray[np.int64]
    step: int
    steps: int
    step_seconds: float
    time: float
    generation: int
    agreed: Agreed = NOTHING_AGREED
    ended: MigrationEnd | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.step_seconds < math.inf:
            raise ValueError(f"a step cannot take {self.step_seconds} seconds")
        if self.steps < 0:
            raise ValueError(f"{self.steps} steps cannot be")

    def joined(self, later: RecordedSnapshot) -> RecordedSnapshot:
        """This snapshot and the next one as one: a server that moves experts would take none in between."""
        steps = self.steps + later.steps
        mean_seconds = later.step_seconds
        if self.step_seconds != mean_seconds:  # else the parts of one snapshot, to the last bit
            seconds = self.steps * self.step_seconds + later.steps * mean_seconds
            mean_seconds = seconds / max(steps, 1)
        reloaded = sorted({*self.agreed.reloaded, *later.agreed.reloaded})
        return replace(
            later,
            counts_ALE=self.counts_ALE.astype(np.int64) + later.counts_ALE,
            steps=steps,
            step_seconds=mean_seconds,
            agreed=replace(
                later.agreed,
                replaced=self.agreed.replaced or later.agreed.replaced,
                reloaded=tuple(reloaded),
            ),
        )

    def sample(
        self,
        placement: Placement | None = None,
        quotas_LP: NDArray[np.float64] | None = None,
    ) -> LoadSample:
        """The sample for the load window. Arguments say what it was served with, see `LoadSample`."""
        return LoadSample(
            counts_ALE=self.counts_ALE.astype(np.int64),
            steps=self.steps,
            step_seconds=self.step_seconds,
            generation=self.generation,
            placement=placement,
            quotas_LP=quotas_LP,
        )

    def snapshot(self) -> Snapshot:
        """The snapshot that the server's loop was sent."""
        return Snapshot(sample=self.sample(), agreed=self.agreed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedPlacement:
    """The placement that is served from the next snapshot on.

    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives.
    step, time: see `RecordedSnapshot`.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    generation: int
    step: int
    time: float


Record = RecordedSnapshot | RecordedPlacement
