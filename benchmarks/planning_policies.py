"""Who decides where experts sit, window by window: the plugin and its peers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import PlannerConfig, RebalanceConfig, WindowConfig
from ep_rebalance.load.window import LoadSample, LoadWindow, WindowLoad, window_load
from ep_rebalance.offline.peers import everything_may_move, place_anew
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.incremental.planner import plan_incremental
from ep_rebalance.planning.problem import Planner, Problem
from ep_rebalance.planning.proposal import Proposer, planned_load
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology

EXPERT_GROUPS = 8
"""Of DeepSeek-V3's router."""

Steps = NDArray[np.int64]


class Policy:
    """What serves a window, and learns from it afterwards.

    load_LE: what the quotas were last fitted to; None before. milliseconds: of each plan. moves: whether a
    change of its placement moves experts that serve.
    """

    name: str
    placement: Placement
    quotas_LP: NDArray[np.float64]
    load_LE: NDArray[np.float64] | None = None
    milliseconds: list[float]
    moves = True

    def window_begins(self, window_NLE: Steps) -> None:
        """The steps that will come, for those who may see them."""

    def snapshot(self, sample: LoadSample) -> None:
        """The steps that have just been served."""

    def window_ends(self, samples: Sequence[LoadSample]) -> None:
        """All snapshots of the window that has just been served."""

    def fit_quotas(self, load_LE: NDArray[np.float64]) -> None:
        self.load_LE, self.quotas_LP = load_LE, split_quotas(self.placement, load_LE)


class Kept(Policy):
    """A placement that stays; its quotas follow the load as the plugin's do."""

    def __init__(self, name: str, placement: Placement) -> None:
        self.name, self.placement, self.milliseconds = name, placement, []
        self._samples: list[LoadSample] = []
        self.quotas_LP = placement.even_quotas_LP()

    def snapshot(self, sample: LoadSample) -> None:
        self._samples = [*self._samples, sample][-WindowConfig().snapshots :]
        self.fit_quotas(planned_load(PlannerConfig(), self._samples).load_LE)


class Anew(Kept):
    """A planner that starts anew from each window."""

    def __init__(self, name: str, planner: Planner, start: Placement, topology: Topology) -> None:
        super().__init__(name, start)
        self._planner, self._topology = planner, topology

    def window_ends(self, samples: Sequence[LoadSample]) -> None:
        problem = everything_may_move(window_load(samples), self.placement, self._topology)
        began = time.perf_counter()
        self.placement = self._planner(problem)
        self.milliseconds.append(1e3 * (time.perf_counter() - began))
        self.fit_quotas(window_load(self._samples).load_LE)


class Ours(Policy):
    """The plugin at its defaults, from a placement like the one that a state file brings back."""

    def __init__(
        self, config: RebalanceConfig, start: Placement, topology: Topology, bytes_L: Sequence[int]
    ) -> None:
        self.name, self.milliseconds = "ep_rebalance", []
        self.placement, self.quotas_LP = start, start.even_quotas_LP()
        self._settings = config.planner
        self._window = LoadWindow(config.window.snapshots)
        self._proposer = Proposer(
            planner=self._solve,
            settings=config.planner,
            decision=config.decision,
            migration=config.migration,
            cost=TokenCost(),
            topology=topology,
            expert_bytes_L=bytes_L,
        )

    def snapshot(self, sample: LoadSample) -> None:
        self._window.append(sample)
        self._fit_quotas()

    def window_ends(self, samples: Sequence[LoadSample]) -> None:
        unseen = self._window.begin_plan()
        proposal = self._proposer.propose(
            self._window.samples(),
            self.placement,
            unseen=unseen,
            step_seconds=self._window.step_seconds,
        )
        if proposal.decision.accepted:
            self.placement = proposal.plan.placement
            self._fit_quotas()

    def _fit_quotas(self) -> None:
        self.fit_quotas(planned_load(self._settings, self._window.samples()).load_LE)

    def _solve(self, problem: Problem) -> Placement:
        began = time.perf_counter()
        placement = plan_incremental(problem)
        self.milliseconds.append(1e3 * (time.perf_counter() - began))
        return placement


class Hindsight(Policy):
    """A placement and quotas made from the very steps that they then serve."""

    name = "hindsight"
    moves = False

    def __init__(self, start: Placement, topology: Topology) -> None:
        self.placement, self.quotas_LP = start, start.even_quotas_LP()
        self.milliseconds = []
        self._start, self._topology = start, topology

    def window_begins(self, window_NLE: Steps) -> None:
        pairs = len(window_NLE) // 2
        load = WindowLoad(
            tokens_WLE=window_NLE[::2].astype(np.float64) + window_NLE[1::2],
            weight_W=np.ones(pairs),
            steps_W=np.full(pairs, 2.0),
        )
        self.placement = place_anew(load, self._start, self._topology)
        self.fit_quotas(load.load_LE)


def vllm_policies(start: Placement, topology: Topology, *, grouped: bool) -> list[Policy]:
    """The installed vLLM's, and if the model's router is `grouped` its branch for such models,
    where the groups divide by the nodes."""
    try:
        from ep_rebalance.engines.vllm.seams.eplb_policy import hierarchical_planner, plan_vllm
    except ImportError:
        return []
    policies: list[Policy] = [Anew("vLLM", plan_vllm, start, topology)]
    nodes = topology.num_nodes
    divides = all(number % nodes == 0 for number in (EXPERT_GROUPS, start.num_ranks))
    if grouped and nodes > 1 and divides and start.num_slots % nodes == 0:
        planner = hierarchical_planner(EXPERT_GROUPS)
        policies.append(Anew("vLLM groups", planner, start, topology))
    return policies
