"""Engine model: what an engine hands over about a model that it has loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.migration.slabs import ExpertsOfLayer
from ep_rebalance.pipeline import ONLY_STAGE, PipelineStage
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.self_test import NOT_TRIED, SelfTest
from ep_rebalance.topology import Topology

ExpertTensors = Callable[[], Sequence[ExpertsOfLayer]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineModel:
    """One rank's view of a loaded model. All but `device` and `expert_tensors` is equal on all ranks.

    engine: its name and version, as traces record them.
    identity: what a saved placement belongs to; its `model` is the name that is shown.
    placement: which logical expert was loaded into each slot. It also gives the numbers of MoE layers,
        logical experts and ranks.
    top_k: experts per token.
    expert_tensors: returns, for each MoE layer, all that this rank's experts consist of: tensors whose local
        slots lie one after another, with or without names, or their slabs. Called at start and whenever
        weights were replaced, since other tensors may hold them then; never in mode observe.
    refusal: returns why experts may not move with the weights that are loaded now, as a clause; "" if they
        may. Called on each rank in the first step after weights were replaced; never in mode observe.
    self_test: what came of trials that the adapter made, for the status.
    group: the EP ranks, in the order of the placement; for collectives of tensors on `device`.
    host_group: the same ranks, for collectives of what lies on the host; None if `group` can do these.
    topology: where the ranks are, and which of them route the same tokens. The first of those counts them.
    max_tokens: tokens. The most that a rank routes in one step, padding included; more are not counted.
    hidden_size: columns of the model's hidden states, for traces; 0 if unknown.
    expert_bytes_L: L sizes, bytes. One expert of each layer, for traces; () if unknown.
    pipeline_stage: which part of the model's layers this is.

    Raises ValueError if the parts do not belong together.
    """

    engine: str
    identity: ModelIdentity
    placement: Placement
    top_k: int
    expert_tensors: ExpertTensors
    refusal: Callable[[], str] = str
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup | None = None
    topology: Topology
    device: torch.device
    max_tokens: int
    hidden_size: int = 0
    expert_bytes_L: Sequence[int] = ()
    self_test: SelfTest = NOT_TRIED
    pipeline_stage: PipelineStage = ONLY_STAGE

    def __post_init__(self) -> None:
        ranks = dist.get_world_size(self.group)
        if not ranks == self.placement.num_ranks == self.topology.num_ranks:
            raise ValueError(
                f"a group of {ranks} ranks, a placement of {self.placement.num_ranks} and a topology of "
                f"{self.topology.num_ranks}"
            )
        if self.expert_bytes_L and len(self.expert_bytes_L) != self.placement.num_layers:
            raise ValueError(
                f"bytes of an expert in {len(self.expert_bytes_L)} layers, and a placement of "
                f"{self.placement.num_layers}"
            )
        if len(self.moe_layers) != self.placement.num_layers:
            raise ValueError(
                f"numbers of {len(self.moe_layers)} layers, and a placement of {self.placement.num_layers}"
            )

    @property
    def moe_layers(self) -> list[int]:
        """L numbers, those that the layers have in the engine's model; from 0 on if it does not say."""
        return list(self.identity.moe_layers or range(self.placement.num_layers))
