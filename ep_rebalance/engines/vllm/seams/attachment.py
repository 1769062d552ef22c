"""Attachment: a loaded model and its drafter, and the sessions that balance them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.engines.port import DraftSession, Session, Sessions
from ep_rebalance.engines.vllm.engine_config import active_config
from ep_rebalance.engines.vllm.seams.drafts import (
    Drafter,
    find_drafter,
    leave_in_place,
    moe_layers_of,
)
from ep_rebalance.engines.vllm.seams.joined_model import (
    JoinedModel,
    LoadedModel,
    join,
    join_drafter,
    loaded_target,
    prepare,
    prepare_drafter,
)
from ep_rebalance.engines.vllm.seams.moe_layers import moe_model

logger = logging.getLogger(__name__)


class Attachment:
    """One worker's sessions, and what they are told of its weights.

    drafter: None if there is none that is counted.
    """

    def __init__(
        self, sessions: Sessions, target: JoinedModel, drafter: JoinedModel | None = None
    ) -> None:
        self.sessions = sessions
        self._target, self._drafter = target, drafter

    @classmethod
    def create(cls, runner: Any, vllm_config: Any, device: torch.device) -> Attachment | None:
        """Attach to the model that a runner has loaded, and to its drafter. Collective.

        Returns None in a pipeline stage that has no experts.

        Raises ConfigurationError if the model turns out not to fit, or a drafter that is to be balanced.
        """
        config = active_config(vllm_config)
        model = runner.get_model()  # the runner's attribute may be a wrapper for CUDA graphs
        target, drafter = moe_model(model), find_drafter(runner)
        if target is None:
            if drafter is not None:
                leave_in_place(drafter.model, device)
            return None
        loaded = loaded_target(target, vllm_config, config)
        session, joined = join(Session, prepare(config, loaded, vllm_config, device))
        leave_in_place(model, device, listed=target.moe_layers)
        draft_session, drafts, uncounted = _join_drafter(drafter, loaded, vllm_config, device)
        sessions = Sessions(session, draft_session, uncounted)
        for each in sessions.both:
            each.start()
        return cls(sessions, joined, drafts)

    def begin_step(
        self,
        phases_T: NDArray[np.int8],
        tokens_R: NDArray[np.integer],
        *,
        started: float,
        continues: bool,
    ) -> None:
        """See `Sessions.begin_step`."""
        # Someone may have called a model's `load_weights` directly, past every method that we wrap.
        self._target.take_up_loads()
        if self._drafter is not None:
            self._drafter.take_up_loads()
        self.sessions.begin_step(phases_T, tokens_R, started=started, continues=continues)

    def weights_loaded(self) -> None:
        """The engine may have loaded weights: those that its loader was seen to load, or else all of the
        target. Loads of a drafter are always seen, or its experts do not move.
        """
        if self._target.all_seen:
            self._target.take_up_loads()
        else:
            self._target.weights_replaced()
        self._target.session.weights_complete()
        if self._drafter is not None and self._drafter.take_up_loads():
            self._drafter.session.weights_complete()

    def target_replaced(self) -> None:
        """The slots of the target's layers hold what the engine's loader writes, in its order."""
        self._target.weights_replaced()

    def weights_replaced(self) -> None:
        """The slots of all layers hold what the engine's loader writes, in its order, or nothing yet."""
        self._target.weights_replaced()
        if self._drafter is not None:
            self._drafter.weights_replaced()


def _join_drafter(
    drafter: Drafter | None, target: LoadedModel, vllm_config: Any, device: torch.device
) -> tuple[DraftSession | None, JoinedModel | None, str]:
    """(session, model, why it has none although it has experts). Collective."""
    if drafter is None or not any(moe_layers_of(drafter.model)):
        return None, None, ""
    try:
        prepared = prepare_drafter(drafter, target, vllm_config, device)
    except ConfigurationError as error:  # the same on all ranks
        _refuse_if_balanced(active_config(vllm_config), error)
        leave_in_place(drafter.model, device)
        return None, None, error.reason
    return *join_drafter(drafter, prepared, device), ""


def _refuse_if_balanced(config: RebalanceConfig, error: ConfigurationError) -> None:
    """Only what was asked for is refused; a drafter that is to stay in place serves uncounted."""
    if config.mode != "observe" and config.drafter == "balanced":
        raise ConfigurationError(
            f"drafter=balanced: {error.reason}", "set drafter=pinned."
        ) from error
    logger.warning(
        "ep_rebalance: the drafter's experts stay where they were loaded, and are not counted: %s",
        error.reason,
    )
