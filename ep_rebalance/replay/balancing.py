"""The server's own stages - window, planner, decision, quotas - run over snapshots that are given to
them; a migration takes no time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load_window import LoadSample, LoadWindow
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import CostModel
from ep_rebalance.planning.plan import Planner
from ep_rebalance.planning.proposal import Proposal, Proposer, planned_load
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology


class ReplayedBalancer:
    """One model's balancer without an engine. Serves `placement` with `quotas_LP`."""

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        planner: Planner,
        cost: CostModel,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        placement: Placement,
    ) -> None:
        self.placement = placement
        self.quotas_LP: NDArray[np.float64] = placement.even_quotas_LP()
        self._settings = config.planner
        self._window = LoadWindow(config.window.snapshots)
        self._unseen = 0
        self._proposer = Proposer(
            planner=planner,
            settings=config.planner,
            decision=config.decision,
            cost=cost,
            topology=topology,
            expert_bytes_L=expert_bytes_L,
        )

    def append(self, sample: LoadSample) -> None:
        """One more snapshot; the quotas follow it. An idle one changes nothing."""
        self._window.append(sample)
        if sample.routed:
            self._unseen += 1
            self._refresh_quotas()

    def plan(self) -> Proposal:
        """Plan from the window, and serve the plan if it is accepted."""
        proposal = self._proposer.propose(
            self._window.samples(),
            self.placement,
            unseen=min(self._unseen, len(self._window)),
            step_seconds=self._window.step_seconds,
        )
        self._unseen = 0
        if proposal.decision.accepted:
            self.placement = proposal.plan.placement
            self._refresh_quotas()
        return proposal

    def _refresh_quotas(self) -> None:
        load = planned_load(self._settings, self._window.samples())
        self.quotas_LP = split_quotas(self.placement, load.load_LE)
