"""A loaded model joined to a `Rebalancer`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.balancer.control import Action
from ep_rebalance.balancer.rebalancer import Rebalancer
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.engines.vllm.engine_config import active_config, model_identity
from ep_rebalance.engines.vllm.parallel import ep_group, ranks_on_nodes
from ep_rebalance.engines.vllm.seams import router
from ep_rebalance.engines.vllm.seams.drafts import draft_model, leave_in_place, satisfy_validation
from ep_rebalance.engines.vllm.seams.expert_loads import ExpertLoads
from ep_rebalance.load.state import SavedState, load_state
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.journal import initial_status
from ep_rebalance.telemetry.metrics import encode
from ep_rebalance.topology import Topology
from ep_rebalance.version import __version__

logger = logging.getLogger(__name__)


class Attachment:
    """One worker's rebalancer and the engine's calls to it."""

    def __init__(
        self,
        rebalancer: Rebalancer,
        counts: RoutingTables,
        recorder: Recorder | None,
        moe_model: Any,
    ) -> None:
        self.rebalancer = rebalancer
        self._counts = counts
        self._recorder = recorder
        self._layers = tuple(moe_model.moe_layers)
        self._loads = ExpertLoads(self._layers)
        self._started: float | None = None
        self._continues = False

    @classmethod
    def create(cls, runner: Any, vllm_config: Any, device: torch.device) -> Attachment:
        """Join the model that a runner has loaded, and its drafter.

        Raises ConfigurationError if the model turns out not to fit.
        """
        config = active_config(vllm_config)
        model = runner.get_model()  # without the wrapper of CUDA graphs
        moe_model = _moe_model(model)
        moves = config.mode != "observe"
        shares = _tokens_are_shared(moe_model)
        placement = _loaded_placement(moe_model, vllm_config)
        topology = ranks_on_nodes(ranks_per_source=_tensor_group().world_size if shares else 1)
        counts = _device_counts(placement, topology, vllm_config, device)
        _attach_routers(moe_model, counts, splits_tokens=not shares, moves_experts=moves)
        leave_in_place(model, device, listed=tuple(moe_model.moe_layers))
        if (draft := draft_model(runner)) is not None:
            leave_in_place(draft, device)
        memory = _expert_memory(moe_model, device) if moves else None
        recorder = _recorder(moe_model, placement, topology, vllm_config, config)
        rebalancer = Rebalancer(
            config=config,
            placement=placement,
            counts=counts,
            memory=memory,
            group=ep_group().device_group,
            planner=planner_of(config.planner.policy),
            topology=topology,
            identity=model_identity(vllm_config, config),
            status=initial_status(
                config=config,
                model=vllm_config.model_config.model,
                placement=placement,
                top_k=moe_model.moe_layers[0].router.top_k,
            ),
            recorder=recorder,
        )
        rebalancer.warm_up()
        if moves:
            _restore(rebalancer, config, vllm_config)
        logger.info(
            "ep_rebalance: mode %s, %d MoE layers, %d experts in %d slots on %d ranks",
            config.mode,
            placement.num_layers,
            placement.num_experts,
            placement.num_slots,
            placement.num_ranks,
        )
        return cls(rebalancer, counts, recorder, moe_model)

    @property
    def busy(self) -> bool:
        """Whether a step of this rank's own tokens has begun and not ended."""
        return self._started is not None

    def begin_step(self, phases_T: NDArray[np.int8], *, started: float, continues: bool) -> None:
        """The step's tokens are known.

        phases_T: int8 [T], PREFILL or DECODE. started: by `time.perf_counter()`. continues: whether the
        engine had work all the time since the step before.
        """
        self._started, self._continues = started, continues
        self._take_up_loads()
        self._counts.mark_tokens(phases_T)

    def end_step(self) -> None:
        """The forward pass was issued."""
        started, self._started = self._started, None
        self.rebalancer.step(started, self._continues)

    @property
    def has_moved_experts(self) -> bool:
        """Whether any slot may hold another expert than the one that was loaded into it."""
        return self.rebalancer.migrator.has_moved_experts

    def weights_loaded(self) -> None:
        """The engine may have loaded weights, of all layers if they do not tell."""
        if self._loads.complete:
            self._take_up_loads()
        else:
            self.weights_replaced()

    def weights_replaced(self) -> None:
        """The slots of all layers hold what the engine's loader writes, in its order, or nothing yet."""
        self._loads.written()
        self._serve_as_loaded(tuple(range(len(self._layers))))

    def _take_up_loads(self) -> None:
        """Also where weights were loaded past the engine, by a caller of the model itself."""
        if written := self._loads.written():
            self._serve_as_loaded(written)

    def _serve_as_loaded(self, layers: tuple[int, ...]) -> None:
        self.rebalancer.weights_replaced(layers)
        if self.rebalancer.config.mode == "observe":
            return
        try:
            self.rebalancer.migrator.replace_memory(_memory_of(self._layers))
        except Exception:
            logger.exception(
                "ep_rebalance: experts of another size or form cannot be moved any more"
            )
            self.rebalancer.migrator.refuse_moves()

    def status(self) -> bytes:
        """The encoded status."""
        return encode(self.rebalancer.status_now())

    def overview(self) -> bytes:
        """The encoded overview."""
        return encode(self.rebalancer.overview())

    def load(self) -> bytes:
        """The encoded load of every expert."""
        return encode(self.rebalancer.journal.load(self.rebalancer.served))

    def ask(self, action: Action) -> str | None:
        """Take an operator's request, as of `Rebalancer.ask`."""
        refusal = self.rebalancer.ask(action)
        if refusal == "":
            logger.info("ep_rebalance: an operator asked to %s", action)
        return refusal

    def record(self, on: bool) -> bool:
        """Switch recording; False on a rank that has no recorder."""
        if self._recorder is None:
            return False
        self._recorder.switch(on)
        logger.info("ep_rebalance: the trace is %s", "recorded" if on else "not recorded")
        return True


def _moe_model(model: Any) -> Any:
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    found = get_mixture_of_experts_model(model)
    if found is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no Mixture-of-Experts layers that vLLM can move.",
            "serve it without --plugin ep_rebalance.",
        )
    return found


def _loaded_placement(model: Any, vllm_config: Any) -> Placement:
    ranks = ep_group().world_size
    if any(layer.expert_placement_strategy == "round_robin" for layer in model.moe_layers):
        return Placement.round_robin(
            num_layers=model.num_moe_layers, num_experts=model.num_logical_experts, num_ranks=ranks
        )
    return Placement.contiguous(
        num_layers=model.num_moe_layers,
        num_experts=model.num_logical_experts,
        num_ranks=ranks,
        num_redundant=vllm_config.parallel_config.eplb_config.num_redundant_experts,
    )


def _tensor_group() -> Any:
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group()


def _tokens_are_shared(model: Any) -> bool:
    """Whether tensor-parallel ranks route the same tokens. The layers say so: models may leave sequence
    parallelism out where the engine's configuration has it.
    """
    splits = {bool(layer.moe_config.is_sequence_parallel) for layer in model.moe_layers}
    if len(splits) > 1:
        raise ConfigurationError(
            f"some MoE layers of {type(model).__name__} are sequence-parallel and others are not.",
            "serve it with --tensor-parallel-size 1.",
        )
    return _tensor_group().world_size > 1 and not splits.pop()


def _device_counts(
    placement: Placement, topology: Topology, vllm_config: Any, device: torch.device
) -> RoutingTables:
    tensor_group = _tensor_group()
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    return RoutingTables(
        placement=placement,
        max_tokens=tokens + 2 * tensor_group.world_size + 1024,
        device=device,
        topology=topology,
        rank=ep_group().rank_in_group,
        counts_here=topology.ranks_per_source == 1 or tensor_group.rank_in_group == 0,
    )


def _attach_routers(
    model: Any, counts: RoutingTables, *, splits_tokens: bool, moves_experts: bool
) -> None:
    for index, layer in enumerate(model.moe_layers):
        _refuse_unseen_routing(layer)
        router.attach(
            layer.router,
            counts,
            index,
            tensor_rank=_tensor_group().rank_in_group if splits_tokens else 0,
            moves_experts=moves_experts,
        )


def _refuse_unseen_routing(layer: Any) -> None:
    """A monolithic kernel routes by itself and never calls the router that we count in
    (vllm/model_executor/layers/fused_moe/runner/moe_runner.py).
    """
    if layer.is_monolithic:
        raise ConfigurationError(
            f"the expert kernel of layer {layer.routed_experts.layer_name!r} "
            f"({type(layer.routed_experts.quant_method).__name__}) routes tokens by itself, so nothing "
            "can be counted.",
            "choose another kernel with --moe-backend, or serve without --plugin ep_rebalance.",
        )


def _expert_memory(model: Any, device: torch.device) -> ExpertMemory:
    for layer in model.moe_layers:
        _refuse_hidden_tensors(layer.routed_experts)
        satisfy_validation(layer.router, device)
    return _memory_of(model.moe_layers)


def _memory_of(layers: Iterable[Any]) -> ExpertMemory:
    """The experts' tensors, as vLLM's own balancer collects them in `MixtureOfExperts.set_eplb_state`."""
    return ExpertMemory([list(layer.get_expert_weights()) for layer in layers])


def _recorder(
    model: Any, placement: Placement, topology: Topology, vllm_config: Any, config: RebalanceConfig
) -> Recorder | None:
    """Rank 0's, if a trace is configured."""
    if config.trace.path is None or ep_group().rank_in_group:
        return None
    head = TraceHead(
        model=vllm_config.model_config.model,
        layers=placement.num_layers,
        experts=placement.num_experts,
        top_k=model.moe_layers[0].router.top_k,
        ep_size=placement.num_ranks,
        slots=placement.num_slots,
        node_of_rank=list(topology.node_of_rank),
        expert_bytes=[_expert_bytes(layer.routed_experts) for layer in model.moe_layers],
        hidden_size=vllm_config.model_config.get_hidden_size(),
        engine=f"vllm {version('vllm')}",
        plugin_version=__version__,
        started=time.time(),
        config=config.as_dict(),
    )
    return Recorder(config.trace, head)


def _expert_bytes(experts: Any) -> int:
    """Of one expert of a layer, before anything is known of how it is packed."""
    tensors = [p for p in experts.parameters() if len(p) == experts.local_num_experts]
    return sum(tensor.nbytes // experts.local_num_experts for tensor in tensors)


def _refuse_hidden_tensors(experts: Any) -> None:
    """An expert's tensor that is no parameter would stay behind when the expert moves."""
    for name, value in vars(experts).items():
        if (
            isinstance(value, torch.Tensor)
            and value.ndim > 1
            and len(value) == experts.local_num_experts
        ):
            raise ConfigurationError(
                f"layer {experts.layer_name!r} keeps the per-expert tensor {name!r} outside its parameters.",
                "use mode=observe, which moves nothing.",
            )


def _restore(rebalancer: Rebalancer, config: RebalanceConfig, vllm_config: Any) -> None:
    """Rank 0 reads the state file; all ranks take up what it found."""
    group = ep_group()
    state: SavedState | None = None
    if config.state.path and group.rank_in_group == 0:
        state = load_state(Path(config.state.path), model_identity(vllm_config, config))
    found = [None if state is None else _portable(state)]
    dist.broadcast_object_list(found, src=group.ranks[0], group=group.cpu_group)
    if found[0] is None:
        return
    slots_LP, quotas_LP, generation = found[0]
    loaded = rebalancer.served.placement
    if slots_LP.shape != loaded.slots_LP.shape:
        raise ConfigurationError(
            f"the state file holds {slots_LP.shape} layers and slots, the model {loaded.slots_LP.shape}.",
            "delete it, or name another file in state.path.",
        )
    placement = Placement(slots_LP, loaded.num_experts, loaded.num_ranks)
    rebalancer.migrator.restore(placement, quotas_LP, generation)
    logger.info("ep_rebalance: took up the saved placement of generation %d", generation)


def _portable(state: SavedState) -> tuple[NDArray[np.int32], NDArray[np.float64], int]:
    return state.placement.slots_LP, state.quotas_LP, state.header.generation
