"""Session: one rank's part in balancing one model, as an engine calls it.

It knows no engine. `engines/port.py` says in which order an adapter calls what.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.balancer.control import Action
from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.rebalancer import Rebalancer
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.collectives.link_speed import with_measured_links
from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.load.state import SavedState, load_state
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import own_planners, planner_of
from ep_rebalance.planning.problem import Planner
from ep_rebalance.policies import POLICIES
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.load_report import ExpertLoad
from ep_rebalance.telemetry.metrics import encode
from ep_rebalance.version import __version__

logger = logging.getLogger(__name__)


class Session:
    """Made on every rank once the model is loaded. Collective, unless in mode observe.

    config: equal on all ranks.

    Raises ConfigurationError if the model cannot be served with it, ValueError for expert tensors that
    cannot be moved.
    """

    def __init__(self, config: RebalanceConfig, model: EngineModel) -> None:
        config = config.on_device(model.device.type).of_stage(model.pipeline_stage)
        self.config = config
        self._moves_experts = config.mode != "observe"
        # Where nothing moves, ids are slots; but the copies that an engine loaded also have to be reached.
        self._dispatches = self._moves_experts or model.placement.num_redundant > 0
        self._rank = dist.get_rank(model.group)
        _check_slots(config, model)
        if self._moves_experts:
            model = _with_measured_links(config, model)
        self._model = model
        self._counts = RoutingTables(
            placement=model.placement,
            max_tokens=model.max_tokens,
            device=model.device,
            topology=model.topology,
            rank=self._rank,
            counts_here=self._rank % model.topology.ranks_per_source == 0,
            by_own_counts=config.dispatch.by_own_counts,
        )
        self._recorder = _recorder(config, model, self._rank)
        self.rebalancer = Rebalancer(
            config,
            model,
            counts=self._counts,
            memory=self._memory() if self._moves_experts else None,
            planner=_planner(config),
            recorder=self._recorder,
        )
        self._started: float | None = None
        self._continues = False
        self._unchecked = False

    def start(self) -> None:
        """Collective, before serving: compile, connect, and take up the saved placement if there is one.

        Raises ConfigurationError for a state file that cannot be used.
        """
        self.rebalancer.warm_up()
        if self._moves_experts:
            self._take_up_saved_state()
            self._take_checksums()
        placement = self._model.placement
        logger.info(
            "ep_rebalance: %smode %s, %d MoE layers, %d experts in %d slots on %d ranks",
            self._model.pipeline_stage.spoken,
            self.config.mode,
            placement.num_layers,
            placement.num_experts,
            placement.num_slots,
            placement.num_ranks,
        )
        if self._moves_experts:
            logger.info(
                "ep_rebalance: %s%.0f MiB reserved for moving experts, %d of them staged at once",
                self._model.pipeline_stage.spoken,
                self.rebalancer.migrator.reserved_bytes / 2**20,
                self.rebalancer.migrator.staging_slots,
            )

    def _memory(self) -> ExpertMemory:
        slots = self._model.placement.slots_per_rank
        return ExpertMemory(self._model.expert_tensors(), slots=slots)

    # A step.

    def begin_step(
        self,
        phases_T: NDArray[np.int8],
        *,
        started: float | None = None,
        continues: bool = False,
    ) -> None:
        """The tokens of a step are known. Not called for steps without tokens of this rank.

        phases_T: int8 [T]. PREFILL or DECODE for each token.
        started: seconds. When its preparation began, by `time.perf_counter()`; now if None.
        continues: whether the engine has had work all the time since the previous step.
        """
        self._note_begin(started, continues)
        self._counts.mark_tokens(phases_T)

    def _note_begin(self, started: float | None, continues: bool) -> None:
        self._started = time.perf_counter() if started is None else started
        self._continues = continues

    def route(
        self,
        layer: int,
        topk_ids_TK: torch.Tensor,
        first_token: int = 0,
        end_token: int | None = None,
    ) -> torch.Tensor:
        """[T, K], the slot over all ranks for each of one layer's logical ids, which are also counted.

        topk_ids_TK: int32 or int64 [T, K]. Logical experts, below 0 for padding.
        first_token: where these rows start among the tokens of `begin_step`.
        end_token: the first of these tokens that is not among these rows, however many they are: those
            beyond it are padding. None if there is none.

        In mode observe the ids are returned as they are, if no expert has a copy. Never waits for the device.
        """
        if self._dispatches:
            return self._counts.route(layer, topk_ids_TK, first_token, end_token)
        self._counts.count(layer, topk_ids_TK, first_token, end_token)
        return topk_ids_TK

    def end_step(self) -> None:
        """The forward pass was issued. Every rank calls this equally often, with tokens or without."""
        if self._unchecked:
            self._check_weights()
        started, self._started = self._started, None
        self.rebalancer.step(started, self._continues)

    @property
    def busy(self) -> bool:
        """Whether a step with tokens of this rank has begun and not ended."""
        return self._started is not None

    # The engine's weights.

    @property
    def has_moved_experts(self) -> bool:
        """Whether any slot may hold another expert than was loaded into it."""
        return self.rebalancer.migrator.has_moved_experts

    def weights_replaced(self, layers: Iterable[int] | None = None) -> None:
        """The slots of some layers hold what the engine's loader writes, in its order, or nothing yet.

        layers: which; all of them if None.

        Ranks may be told in different steps, but of the same layers in the same order.
        """
        every = range(self._model.placement.num_layers)
        self.rebalancer.weights_replaced(tuple(every if layers is None else layers))
        if not self._moves_experts:
            return
        self._replace_memory()
        self._unchecked = True

    def weights_complete(self) -> None:
        """The engine may have made the last of its weights whole, without a loader that was seen."""
        self._unchecked = self._moves_experts
        if (audit := self.rebalancer.migrator.audit) is not None:
            audit.forget(range(self._model.placement.num_layers))

    def before_weights_go(self) -> None:
        """The engine is about to give the memory of its weights back: nothing may be reading it."""
        if (audit := self.rebalancer.migrator.audit) is not None:
            audit.settle()

    def _check_weights(self) -> None:
        """Whether experts may move with what was loaded, as at start; on each rank before its next vote."""
        self._unchecked = False
        if self._replace_memory() and (refusal := self._refusal()):
            logger.error(
                "ep_rebalance: experts are not moved with the weights that were loaded: %s. "
                "Remedy: restart the server with them.",
                refusal,
            )
            self.rebalancer.migrator.refuse_moves()

    def _refusal(self) -> str:
        try:
            return self._model.refusal()
        except Exception as error:
            logger.exception("ep_rebalance: the weights that were loaded could not be examined")
            return f"they could not be examined ({type(error).__name__})"

    def _replace_memory(self) -> bool:
        """Whether moves go on, in the memory in which the experts are now."""
        migrator = self.rebalancer.migrator
        try:
            migrator.replace_memory(self._memory())
        except Exception:
            # This rank still takes part in exchanges and votes, or the others would wait for it.
            logger.exception(
                "ep_rebalance: experts are not whole or have another size or layout, so none are moved "
                "until others are loaded"
            )
            migrator.refuse_moves()
            return False
        migrator.allow_moves()
        return True

    # What is asked from outside.

    def status(self) -> bytes:
        """The encoded status."""
        return encode(self.rebalancer.status_now())

    def overview(self) -> bytes:
        """The encoded overview."""
        return encode(self.rebalancer.overview())

    def load(self) -> bytes:
        """The encoded load of every expert."""
        return encode(self.expert_load())

    def expert_load(self) -> ExpertLoad:
        """The load of every expert."""
        return self.rebalancer.journal.load(self.rebalancer.served)

    def ask(self, action: Action) -> str | None:
        """Take an operator's request; see `Rebalancer.ask`."""
        refusal = self.rebalancer.ask(action)
        if refusal == "":
            logger.info("ep_rebalance: an operator asked to %s", action)
        return refusal

    def record(self, on: bool) -> bool:
        """Switch recording on or off. Returns False on a rank that has no recorder."""
        if self._recorder is None:
            return False
        self._recorder.switch(on)
        logger.info("ep_rebalance: an operator asked to %s", "record" if on else "record no more")
        return True

    def record_answer(self) -> str | None:
        """What came of it: "", or why nothing is recorded; NOT_ANSWERED as long as the disk does not say.

        None on a rank that has no recorder.
        """
        return None if self._recorder is None else self._recorder.answer

    def _take_checksums(self) -> None:
        if (audit := self.rebalancer.migrator.audit) is None:
            return
        audit.take_all()
        logger.info(
            "ep_rebalance: %d slots a minute are checked against their checksums",
            self.config.audit.slots_per_minute,
        )

    def _take_up_saved_state(self) -> None:
        """Rank 0 reads the state file, and all ranks serve what it found."""
        model = self._model
        state: SavedState | None = None
        if self.config.state.path and self._rank == 0:
            state = load_state(Path(self.config.state.path), model.identity)
        found = [None if state is None else _portable(state)]
        group = model.host_group or model.group
        dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
        if found[0] is None:
            if self.config.mode == "static":
                raise ConfigurationError(
                    f"mode=static serves the placement in {self.config.state.path!r}, and the host of EP "
                    "rank 0 has no such file.",
                    "name a file in a folder that all hosts share, or copy it there.",
                )
            return
        slots_LP, quotas_LP, generation = found[0]
        loaded = model.placement
        if slots_LP.shape != loaded.slots_LP.shape:
            raise ConfigurationError(
                f"the state file holds {slots_LP.shape} layers and slots, the model {loaded.slots_LP.shape}.",
                "delete it, or name another file in state.path.",
            )
        placement = Placement(slots_LP, loaded.num_experts, loaded.num_ranks)
        self.rebalancer.migrator.restore(placement, quotas_LP, generation)
        logger.info("ep_rebalance: took up the saved placement of generation %d", generation)


def _check_slots(config: RebalanceConfig, model: EngineModel) -> None:
    wanted, there = config.planner.redundant_experts, model.placement.num_redundant
    if config.mode != "observe" and wanted != there:
        raise ConfigurationError(
            f"planner.redundant_experts={wanted}, and the engine loaded {there} redundant slots.",
            "set them alike; an adapter has to load as many as the setting says.",
        )


def _with_measured_links(config: RebalanceConfig, model: EngineModel) -> EngineModel:
    topology = with_measured_links(
        model.topology, config.links, group=model.group, device=model.device
    )
    return replace(model, topology=topology)


def _planner(config: RebalanceConfig) -> Planner:
    policy = config.planner.policy
    try:
        return planner_of(policy)
    except ImportError as error:
        raise ConfigurationError(
            f"planner.policy={policy} needs {POLICIES[policy].needs} ({error}).",
            f"choose one of {', '.join(own_planners())}.",
        ) from None


def _recorder(config: RebalanceConfig, model: EngineModel, rank: int) -> Recorder | None:
    """Rank 0's, if a trace is configured."""
    if config.trace.path is None or rank:
        return None
    if model.pipeline_stage.label:
        # This may be another host than the one on which `trace.path` was looked at.
        with contextlib.suppress(OSError):  # which the recorder will meet again, and explain
            Path(config.trace.path).mkdir(parents=True, exist_ok=True)
    placement = model.placement
    head = TraceHead(
        model=model.identity.model,
        layers=placement.num_layers,
        experts=placement.num_experts,
        top_k=model.top_k,
        ep_size=placement.num_ranks,
        slots=placement.num_slots,
        node_of_rank=list(model.topology.node_of_rank),
        bytes_per_second=list(model.topology.bytes_per_second),
        round_seconds=model.topology.round_seconds,
        expert_bytes=list(model.expert_bytes_L) or [0] * placement.num_layers,
        moe_layers=model.moe_layers,
        hidden_size=model.hidden_size,
        engine=model.engine,
        plugin_version=__version__,
        started=time.time(),
        config=config.as_dict(),
    )
    return Recorder(config.trace, head)


def _portable(state: SavedState) -> tuple[NDArray[np.int32], NDArray[np.float64], int]:
    return state.placement.slots_LP, state.quotas_LP, state.header.generation
