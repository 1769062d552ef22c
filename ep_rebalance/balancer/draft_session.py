"""Draft session: one rank's part in balancing a drafter's model, beside the session of its target.

Its experts may be others, and other in number, and it computes other tokens: so it has counters, placement,
plans and files of its own. Both sessions end the same steps in the same order on all ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.session import Session
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.planning.step_model import ASSUMED_FRACTION
from ep_rebalance.routing.draft_passes import DraftPasses


class DraftSession(Session):
    """A session whose model runs several times in a step. Made after the target's, on every rank.

    config: equal on all ranks; see `drafter_settings`.
    """

    def __init__(self, config: RebalanceConfig, model: EngineModel) -> None:
        super().__init__(config, model)
        self._passes = DraftPasses(self._counts)

    def begin_drafting(
        self,
        phases_T: NDArray[np.int8],
        tokens_R: NDArray[np.integer],
        *,
        started: float | None = None,
        continues: bool = False,
    ) -> None:
        """In the place of `begin_step`: the target's tokens are known.

        phases_T: int8 [T]. PREFILL or DECODE for each of them.
        tokens_R: [R] tokens of each request, which lie one after another.
        """
        self._note_begin(started, continues)
        self._passes.begin_step(phases_T, tokens_R)

    def begin_pass(self, rows: int) -> None:
        """A forward pass of the drafter is next; may be captured into a graph.

        rows: the first of its rows, which are tokens.
        """
        self._passes.begin_pass(rows)

    def end_step(self) -> None:
        self._passes.end_step()
        super().end_step()


def drafter_settings(
    config: RebalanceConfig, *, redundant_experts: int, work_share: float
) -> RebalanceConfig:
    """The settings of a drafter's session.

    redundant_experts: slots beyond one for each of its experts, as they were loaded.
    work_share: 0 to 1. The drafter's part of what experts do in a step.

    What of a step waits for a drafter's experts is not learned, since step times hardly depend on them: it is
    their part of what waits for experts at all.
    """
    waiting = config.decision.expert_time_fraction
    fraction = (ASSUMED_FRACTION if waiting == "auto" else waiting) * work_share
    mode = "observe" if config.drafter == "pinned" else config.mode
    # Mode observe asks for no copies, and settings in a trace have to be such as a server takes.
    wanted = 0 if mode == "observe" else redundant_experts
    return config.model_copy(
        update={
            "mode": mode,
            "planner": config.planner.model_copy(update={"redundant_experts": wanted}),
            "decision": config.decision.model_copy(update={"expert_time_fraction": fraction}),
        }
    )
