"""Attachment: a loaded model and the `Session` that balances it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.port import EngineModel, Session
from ep_rebalance.engines.vllm.data_plane import carries_tokens
from ep_rebalance.engines.vllm.engine_config import active_config, model_identity
from ep_rebalance.engines.vllm.movable_experts import (
    MovableExperts,
    listed_bytes,
    movable_experts,
)
from ep_rebalance.engines.vllm.parallel import (
    ep_group,
    pipeline_stage,
    ranks_on_nodes,
    tensor_group,
)
from ep_rebalance.engines.vllm.seams import router
from ep_rebalance.engines.vllm.seams.drafts import draft_model, leave_in_place, satisfy_validation
from ep_rebalance.engines.vllm.seams.expert_loads import ExpertLoads
from ep_rebalance.engines.vllm.seams.moe_layers import MoeModel, moe_model, refuse_unlike
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.self_test import NOT_TRIED


class Attachment:
    """One worker's session, and which of the model's layers vLLM has loaded again."""

    def __init__(self, session: Session, moe_layers: Iterable[Any]) -> None:
        self.session = session
        self._loads = ExpertLoads(tuple(moe_layers))

    @classmethod
    def create(cls, runner: Any, vllm_config: Any, device: torch.device) -> Attachment | None:
        """Attach to the model that a runner has loaded, and to its drafter. Collective.

        Returns None in a pipeline stage that has no experts.

        Raises ConfigurationError if the model turns out not to fit.
        """
        config = active_config(vllm_config)
        model = runner.get_model()  # the runner's attribute may be a wrapper for CUDA graphs
        target = moe_model(model)
        if (draft := draft_model(runner)) is not None:
            leave_in_place(draft, device)
        if target is None:
            return None
        refuse_unlike(target, config.planner.redundant_experts)
        shares = _tokens_are_shared(target)
        for layer in target.moe_layers:
            _refuse_unseen_routing(layer)
        if carries_tokens(config):
            _refuse_dealt_out(target)
        experts: MovableExperts | None = None
        if config.mode != "observe":
            for layer in target.moe_layers:
                satisfy_validation(layer.router, device)
            experts = movable_experts(tuple(target.moe_layers), vllm_config, config.quantisation)
        session = Session(
            config, _engine_model(target, vllm_config, experts, device, shares_tokens=shares)
        )
        _attach_routers(target, session, splits_tokens=not shares)
        leave_in_place(model, device, listed=tuple(target.moe_layers))
        session.start()
        return cls(session, target.moe_layers)

    def begin_step(self, phases_T: NDArray[np.int8], *, started: float, continues: bool) -> None:
        """See `Session.begin_step`."""
        # Someone may have called the model's `load_weights` directly, past every method that we wrap.
        self._take_up_loads()
        self.session.begin_step(phases_T, started=started, continues=continues)

    def weights_loaded(self) -> None:
        """The engine may have loaded weights: those that its loader was seen to load, or else all."""
        if self._loads.complete:
            self._take_up_loads()
        else:
            self.weights_replaced()
        self.session.weights_complete()

    def weights_replaced(self) -> None:
        """The slots of all layers hold what the engine's loader writes, in its order, or nothing yet."""
        self._loads.written()  # so that the next call does not report these loads again
        self.session.weights_replaced()

    def _take_up_loads(self) -> None:
        if written := self._loads.written():
            self.session.weights_replaced(written)


def _engine_model(
    model: MoeModel,
    vllm_config: Any,
    experts: MovableExperts | None,
    device: torch.device,
    *,
    shares_tokens: bool,
) -> EngineModel:
    """What the balancer has to know about the model. Collective.

    experts: None in mode observe.
    """
    import vllm

    config = active_config(vllm_config)

    layers, group = tuple(model.moe_layers), ep_group()
    tensor_ranks = tensor_group().world_size
    batched = vllm_config.scheduler_config.max_num_batched_tokens
    return EngineModel(
        engine=f"vllm {vllm.__version__}",
        identity=model_identity(vllm_config, config, model.layer_numbers),
        placement=_loaded_placement(model, vllm_config),
        top_k=layers[0].router.top_k,
        expert_tensors=list if experts is None else experts.slabs,
        refusal=str if experts is None else experts.refusal,
        self_test=NOT_TRIED if experts is None else experts.self_test,
        group=group.device_group,
        host_group=group.cpu_group,
        topology=ranks_on_nodes(ranks_per_source=tensor_ranks if shares_tokens else 1),
        device=device,
        # The scheduler's bound, and room for the padding that vLLM adds to a batch.
        max_tokens=batched + 2 * tensor_ranks + 1024,
        hidden_size=vllm_config.model_config.get_hidden_size(),
        expert_bytes_L=[listed_bytes(layer.routed_experts) for layer in layers]
        if experts is None
        else experts.expert_bytes_L,
        pipeline_stage=pipeline_stage(),
    )


def _loaded_placement(model: MoeModel, vllm_config: Any) -> Placement:
    """What vLLM's loader puts in each slot."""
    # Not `num_moe_layers`: some models compute it from their configuration, and it is too large where
    # only every second layer has experts (vllm/model_executor/models/deepseek_v2.py).
    layers, ranks = len(model.moe_layers), ep_group().world_size
    if _dealt_out(model):
        return Placement.round_robin(
            num_layers=layers, num_experts=model.num_logical_experts, num_ranks=ranks
        )
    return Placement.contiguous(
        num_layers=layers,
        num_experts=model.num_logical_experts,
        num_ranks=ranks,
        num_redundant=vllm_config.parallel_config.eplb_config.num_redundant_experts,
    )


def _dealt_out(model: MoeModel) -> bool:
    """Whether vLLM's loader has put expert `e` on rank `e % R`."""
    return any(layer.expert_placement_strategy == "round_robin" for layer in model.moe_layers)


def _tokens_are_shared(model: MoeModel) -> bool:
    """Whether tensor-parallel ranks route the same tokens.

    The layers are asked, since a model may do without sequence parallelism though the engine's
    configuration asks for it.
    """
    splits = {bool(layer.moe_config.is_sequence_parallel) for layer in model.moe_layers}
    if len(splits) > 1:
        raise ConfigurationError(
            f"some MoE layers of {model.name} are sequence-parallel and others are not.",
            "serve it with --tensor-parallel-size 1.",
        )
    return tensor_group().world_size > 1 and not splits.pop()


def _attach_routers(model: MoeModel, session: Session, *, splits_tokens: bool) -> None:
    tensor_rank = tensor_group().rank_in_group if splits_tokens else 0
    for index, layer in enumerate(model.moe_layers):
        router.attach(layer.router, session, index, tensor_rank=tensor_rank)


def _refuse_unseen_routing(layer: Any) -> None:
    """A monolithic kernel selects experts itself and never calls the router in which we count
    (vllm/model_executor/layers/fused_moe/runner/moe_runner.py).
    """
    if layer.is_monolithic:
        raise ConfigurationError(
            f"the expert kernel of layer {layer.routed_experts.layer_name!r} "
            f"({type(layer.routed_experts.quant_method).__name__}) routes tokens by itself, so nothing "
            "can be counted.",
            "choose another kernel with --moe-backend, or serve without --plugin ep_rebalance.",
        )


def _refuse_dealt_out(model: MoeModel) -> None:
    """Our all-to-all takes ids for slots of the linear placement."""
    if _dealt_out(model):
        raise ConfigurationError(
            "--expert-placement-strategy round_robin: our all-to-all sends tokens to where linear placement "
            "has their experts.",
            "drop it, or set data_plane.all_to_all=engine.",
        )
