"""A whole engine in a page: a few MoE layers on gloo ranks, balanced by way of the port alone.

Ranks have tokens of their own (data parallelism) and share out the experts. Every rank has the whole
checkpoint, as if it lay on disk. `alone` is the same model in one process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ep_rebalance.all_to_all import make_all_to_all
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.engines.port import EngineModel, Session
from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.pipeline import ONLY_STAGE, PipelineStage
from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 2, 8, 2, 16, 24
MAX_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """router: [L, H, E]; up: [L, E, I, H]; down: [L, E, H, I]; all float32."""

    router: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, seed: int) -> "Checkpoint":
        """The same router for every seed, and other experts."""
        router, experts = (torch.Generator().manual_seed(number) for number in (0, seed))
        return cls(
            router=torch.randn(LAYERS, HIDDEN, EXPERTS, generator=router),
            up=torch.randn(LAYERS, EXPERTS, INNER, HIDDEN, generator=experts) / 4,
            down=torch.randn(LAYERS, EXPERTS, HIDDEN, INNER, generator=experts) / 20,
        )


def choose(hidden_TH: torch.Tensor, router_HE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logical ids int64 [T, K], weights float32 [T, K]) of each token's experts."""
    weights_TK, ids_TK = torch.topk(torch.softmax(hidden_TH @ router_HE, 1), TOP_K)
    return ids_TK, weights_TK


def compute(
    rows_NH: torch.Tensor, slots_N: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """[N, H], each row by the expert in its slot of `up` and `down`. A product per row, and not per
    expert, so that no bit of a row depends on those beside it.
    """
    inner_NI = (up[slots_N] * rows_NH.unsqueeze(1)).sum(2).relu()
    return (down[slots_N] * inner_NI.unsqueeze(1)).sum(2)


def alone(checkpoint: Checkpoint, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs [T, H], logical ids [L, T, K]) of one process without expert parallelism."""
    chosen = []
    for layer in range(LAYERS):
        ids_TK, weights_TK = choose(hidden_TH, checkpoint.router[layer])
        total_TH = torch.zeros_like(hidden_TH)
        for ids_T, weights_T in zip(ids_TK.unbind(1), weights_TK.unbind(1), strict=True):
            outputs = compute(hidden_TH, ids_T, checkpoint.up[layer], checkpoint.down[layer])
            total_TH = torch.addcmul(total_TH, outputs, weights_T.unsqueeze(1))
        hidden_TH = hidden_TH + total_TH
        chosen.append(ids_TK)
    return hidden_TH, torch.stack(chosen)


class TinyEngine:
    """One rank. ranks_per_source: those that are given the same tokens. reads: times that the session
    asked for the expert tensors. half_loaded: whether it has none to show. refusal: why they may not move.
    make, stage: of its session. redundant: slots beyond one for each expert, if others than are configured.
    """

    def __init__(
        self,
        rank: int,
        config: RebalanceConfig,
        checkpoint: Checkpoint,
        ranks_per_source: int = 1,
        *,
        make: Callable[[RebalanceConfig, EngineModel], Session] = Session,
        stage: PipelineStage = ONLY_STAGE,
        redundant: int | None = None,
    ) -> None:
        if redundant is None:
            redundant = config.planner.redundant_experts
        group, ranks = dist.group.WORLD, dist.get_world_size()
        self.placement = Placement.contiguous(
            num_layers=LAYERS,
            num_experts=EXPERTS,
            num_ranks=ranks,
            num_redundant=redundant,
        )
        slots = self.placement.slots_per_rank
        self._mine_LS = self.placement.slots_LP[:, rank * slots : (rank + 1) * slots]
        self._up = [torch.empty(slots, INNER, HIDDEN) for _ in range(LAYERS)]
        self._down = [torch.empty(slots, HIDDEN, INNER) for _ in range(LAYERS)]
        self.load(checkpoint)
        self._all_to_all = make_all_to_all(config, group=group, slots_per_rank=slots)
        self.reads = 0
        self.half_loaded = False
        self.refusal = ""
        identity = ModelIdentity(
            model="tiny",
            config_hash="tiny",
            experts=EXPERTS,
            ep_size=ranks,
            redundant_experts=redundant,
        )
        model = EngineModel(
            engine="tiny 1",
            identity=identity,
            placement=self.placement,
            top_k=TOP_K,
            expert_tensors=self._expert_tensors,
            refusal=lambda: self.refusal,
            group=group,
            topology=Topology(node_of_rank=(0,) * ranks, ranks_per_source=ranks_per_source),
            device=torch.device("cpu"),
            max_tokens=MAX_TOKENS,
            pipeline_stage=stage,
        )
        self.session = make(config, model)

    def load(self, checkpoint: Checkpoint) -> None:
        """Write every slot with the expert of the loaded placement."""
        self._router = checkpoint.router
        for layer, mine_S in enumerate(torch.from_numpy(self._mine_LS.astype(np.int64))):
            self._up[layer].copy_(checkpoint.up[layer, mine_S])
            self._down[layer].copy_(checkpoint.down[layer, mine_S])

    def step(self, hidden_TH: torch.Tensor, phases_T: np.ndarray) -> torch.Tensor:
        """One forward pass: [T, H]. Every rank takes part, with tokens or without."""
        if len(hidden_TH):
            self.session.begin_step(phases_T)
        hidden_TH = self.forward(hidden_TH)
        self.session.end_step()
        return hidden_TH

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, H]. Its tokens are those of the step that the session knows."""
        for layer in range(LAYERS):
            hidden_TH = hidden_TH + self._experts(layer, hidden_TH)
        return hidden_TH

    def _experts(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        ids_TK, weights_TK = choose(hidden_TH, self._router[layer])
        slots_TK = self.session.route(layer, ids_TK)
        sent = self._all_to_all.dispatch(hidden_TH, slots_TK, weights_TK)
        outputs = compute(
            sent.rows_MH, sent.local_slots_N.long(), self._up[layer], self._down[layer]
        )
        out_TH = torch.empty_like(hidden_TH)
        self._all_to_all.combine(sent, outputs, out_TH)
        return out_TH

    def _expert_tensors(self) -> list[list[torch.Tensor]]:
        self.reads += 1
        if self.half_loaded:
            return []
        return [[up, down] for up, down in zip(self._up, self._down, strict=True)]
