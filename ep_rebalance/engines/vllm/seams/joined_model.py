"""Joined model: a target or a drafter that vLLM has loaded, with its session and its routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.engines.port import DraftSession, EngineModel, Session, drafter_settings
from ep_rebalance.engines.vllm.data_plane import carries_tokens
from ep_rebalance.engines.vllm.engine_config import active_config, model_identity
from ep_rebalance.engines.vllm.movable_experts import (
    WITHOUT_COPIES,
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
from ep_rebalance.engines.vllm.seams import draft_passes, router
from ep_rebalance.engines.vllm.seams.drafts import Drafter, leave_in_place, satisfy_validation
from ep_rebalance.engines.vllm.seams.expert_loads import ExpertLoads, left_out
from ep_rebalance.engines.vllm.seams.moe_layers import MoeModel, moe_model, refuse_unlike
from ep_rebalance.pipeline import PipelineStage
from ep_rebalance.placement import Placement, can_be_shared, first_slots_R1
from ep_rebalance.telemetry.self_test import NOT_TRIED

AnySession = TypeVar("AnySession", bound=Session)


class JoinedModel:
    """A model's session, and which of its layers vLLM has loaded again.

    all_seen: whether every layer has been loaded through vLLM's loader, so that no load goes unseen.
    """

    def __init__(self, session: Session, moe_layers: Iterable[Any]) -> None:
        self.session = session
        self._loads = ExpertLoads(tuple(moe_layers))
        self.all_seen = self._loads.complete

    def take_up_loads(self) -> bool:
        """Layers that were loaded since the last call are as loaded. Returns whether there are any."""
        written = self._loads.written()
        if written:
            self.session.weights_replaced(written)
        return bool(written)

    def weights_replaced(self) -> None:
        """The slots of all layers hold what the engine's loader writes, in its order, or nothing yet."""
        self._loads.written()  # so that the next call does not report these loads again
        self.session.weights_replaced()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A target or a drafter, as vLLM has loaded it.

    config: vLLM's of the model.
    redundant: slots beyond one for each expert.
    unfilled: whether vLLM left some of them empty.
    max_tokens: the most rows of a forward pass.
    """

    moe: MoeModel
    config: Any
    redundant: int
    unfilled: bool = False
    max_tokens: int
    stage: PipelineStage

    @property
    def bytes_read(self) -> int:
        """Bytes of a rank's experts, as a step reads them at most."""
        experts = [layer.routed_experts for layer in self.moe.moe_layers]
        return sum(listed_bytes(one) * one.local_num_experts for one in experts)


def loaded_target(moe: MoeModel, vllm_config: Any, config: RebalanceConfig) -> LoadedModel:
    """Collective. Raises ConfigurationError, the same on all ranks, for slots that cannot be served."""
    redundant = config.planner.redundant_experts
    refuse_unlike(moe, redundant)
    return LoadedModel(
        moe=moe,
        config=vllm_config.model_config,
        redundant=redundant,
        unfilled=redundant > 0 and _lacks_copies(moe),
        max_tokens=_most_rows(vllm_config),
        stage=pipeline_stage(),
    )


def _loaded_drafter(moe: MoeModel, vllm_config: Any) -> LoadedModel:
    """vLLM makes redundant slots for layers that share the target's configuration, and for no others."""
    redundant = moe.slots - moe.num_logical_experts
    refuse_unlike(moe, redundant)
    spread = {layer.moe_config.ep_size for layer in moe.moe_layers}
    if spread != {ep_group().world_size}:
        raise ConfigurationError(
            f"experts of {moe.name} are not spread over the EP ranks: expert parallelism is off for it.",
            "serve it with the target's parallelism.",
        )
    _refuse_unshared(moe)
    if redundant and _lacks_copies(moe):
        raise ConfigurationError(
            f"vLLM's {moe.name} makes redundant slots and loads no copies of experts into them.",
            "set drafter=pinned.",
        )
    speculative = vllm_config.speculative_config
    drafted = vllm_config.scheduler_config.max_num_seqs * (1 + speculative.num_speculative_tokens)
    return LoadedModel(
        moe=moe,
        config=speculative.draft_model_config,
        redundant=redundant,
        max_tokens=_most_rows(vllm_config) + drafted,
        stage=replace(pipeline_stage(), drafter=True),
    )


def _refuse_unshared(moe: MoeModel) -> None:
    ranks = ep_group().world_size
    if not can_be_shared(moe.slots, moe.num_logical_experts, ranks):
        raise ConfigurationError(
            f"{moe.slots} slots of {moe.name} for {moe.num_logical_experts} experts do not divide by {ranks} "
            "ranks.",
            "set drafter=pinned.",
        )


def _lacks_copies(moe: MoeModel) -> bool:
    """Whether vLLM's loader left redundant slots empty, on any rank. Collective.

    Into these vLLM loads nothing from checkpoints with one tensor for all experts of a layer
    (vllm/model_executor/layers/fused_moe/routed_experts.py, `load_weights`), nor do some MTP layers from any
    (vllm/model_executor/models/deepseek_mtp.py, glm4_moe_mtp.py).

    Raises ConfigurationError, the same on all ranks, for an expert that no rank holds whole.
    """
    group, experts = ep_group(), moe.num_logical_experts
    first, stop = first_slots_R1(moe.slots, group.world_size)[group.rank_in_group :][:2].tolist()
    parts = range(first, min(stop, experts)), range(max(first, experts), stop)
    ours = [any(left_out(layer.routed_experts, part) for layer in moe.moe_layers) for part in parts]
    empty_R: list[list[bool]] = [ours] * group.world_size
    dist.all_gather_object(empty_R, ours, group=group.cpu_group)
    if any(experts_missing for experts_missing, _ in empty_R):
        raise ConfigurationError(
            f"vLLM's {moe.name} has loaded only some of its experts.", WITHOUT_COPIES
        )
    return any(copies_missing for _, copies_missing in empty_R)


def _work_share(passes: int, drafter: LoadedModel, target: LoadedModel) -> float:
    """0 to 1, the drafter's part of what experts do in a step: by the bytes that they read or, on a rank that
    has none or where kernels keep them out of the parameters, by layers.
    """
    ours, theirs = drafter.bytes_read, target.bytes_read
    if not ours or not theirs:
        ours, theirs = len(drafter.moe.moe_layers), len(target.moe.moe_layers)
    return passes * ours / (passes * ours + theirs)


def _most_rows(vllm_config: Any) -> int:
    """The scheduler's bound, and room for the padding that vLLM adds to a batch."""
    batched: int = vllm_config.scheduler_config.max_num_batched_tokens
    ranks: int = tensor_group().world_size
    return batched + 2 * ranks + 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A loaded model that can be joined. config: of its session. model: what the session knows of it."""

    loaded: LoadedModel
    config: RebalanceConfig
    model: EngineModel
    splits_tokens: bool


def prepare_drafter(
    drafter: Drafter, target: LoadedModel, vllm_config: Any, device: torch.device
) -> PreparedModel:
    """Collective.

    Raises ConfigurationError, the same on all ranks, for what cannot be counted, or moved if it is to be.
    """
    moe = moe_model(drafter.model)
    if moe is None:
        raise ConfigurationError(
            f"{type(drafter.model).__name__} does not list its MoE layers.", "set drafter=pinned."
        )
    loaded = _loaded_drafter(moe, vllm_config)
    passes = vllm_config.speculative_config.num_speculative_tokens
    config = drafter_settings(
        active_config(vllm_config),
        redundant_experts=loaded.redundant,
        work_share=_work_share(passes, loaded, target),
    )
    draft_passes.refuse_untold(drafter.proposer)
    prepared = prepare(config, loaded, vllm_config, device)
    if config.mode != "observe" and not ExpertLoads(moe.moe_layers).complete:
        raise ConfigurationError(
            f"experts of {moe.name} were not loaded by vLLM's own loader, and an update that leaves them out "
            "cannot be told from one that replaces them.",
            "set drafter=pinned.",
        )
    return prepared


def prepare(
    config: RebalanceConfig, loaded: LoadedModel, vllm_config: Any, device: torch.device
) -> PreparedModel:
    """Collective. Raises ConfigurationError, the same on all ranks."""
    layers = loaded.moe.moe_layers
    shares = _tokens_are_shared(loaded.moe)
    for layer in layers:
        _refuse_unseen_routing(layer)
    if carries_tokens(config):
        _refuse_dealt_out(loaded.moe)
    if active_config(vllm_config).mode != "observe":
        for layer in layers:
            satisfy_validation(layer.router, device)
    experts: MovableExperts | None = None
    if config.mode != "observe":
        unfilled = _loaded_placement(loaded.moe, loaded.redundant) if loaded.unfilled else None
        experts = movable_experts(layers, vllm_config, config.quantisation, unfilled)
    model = _engine_model(loaded, config, vllm_config, experts, device, shares_tokens=shares)
    return PreparedModel(loaded=loaded, config=config, model=model, splits_tokens=not shares)


def join_drafter(
    drafter: Drafter, prepared: PreparedModel, device: torch.device
) -> tuple[DraftSession, JoinedModel]:
    """As `join`, with a session that the drafter tells of its passes."""
    session, joined = join(DraftSession, prepared)
    draft_passes.tell(drafter.proposer, session)
    leave_in_place(drafter.model, device, listed=prepared.loaded.moe.moe_layers)
    return session, joined


def join(
    make: Callable[[RebalanceConfig, EngineModel], AnySession], prepared: PreparedModel
) -> tuple[AnySession, JoinedModel]:
    """A session of a prepared model, whose routers are joined to it. Collective.

    Raises ConfigurationError for files that cannot be used, on the rank alone that would write them: the
    server has to end then.
    """
    moe = prepared.loaded.moe
    session = make(prepared.config, prepared.model)
    _attach_routers(moe, session, splits_tokens=prepared.splits_tokens)
    return session, JoinedModel(session, moe.moe_layers)


def _engine_model(
    loaded: LoadedModel,
    config: RebalanceConfig,
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

    layers, group = loaded.moe.moe_layers, ep_group()
    numbers = loaded.moe.layer_numbers
    return EngineModel(
        engine=f"vllm {vllm.__version__}",
        identity=model_identity(vllm_config, config, numbers, loaded.config),
        placement=_loaded_placement(loaded.moe, loaded.redundant),
        top_k=layers[0].router.top_k,
        expert_tensors=list if experts is None else experts.slabs,
        refusal=str if experts is None else experts.refusal,
        self_test=NOT_TRIED if experts is None else experts.self_test,
        group=group.device_group,
        host_group=group.cpu_group,
        topology=ranks_on_nodes(ranks_per_source=tensor_group().world_size if shares_tokens else 1),
        device=device,
        max_tokens=loaded.max_tokens,
        hidden_size=loaded.config.get_hidden_size(),
        expert_bytes_L=[listed_bytes(layer.routed_experts) for layer in layers]
        if experts is None
        else experts.expert_bytes_L,
        pipeline_stage=loaded.stage,
    )


def _loaded_placement(model: MoeModel, redundant: int) -> Placement:
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
        num_redundant=redundant,
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
