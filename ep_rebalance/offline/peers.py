"""Peers: what a replay is compared with. Their placements do not come from the server's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import PlannerConfig, RebalanceConfig
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot
from ep_rebalance.load.window import LoadWindow, WindowLoad
from ep_rebalance.offline.balancing import PlanMade
from ep_rebalance.offline.eplb_settings import Eplb
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import cost_model
from ep_rebalance.planning.greedy import plan_greedy
from ep_rebalance.planning.incremental.planner import plan_incremental
from ep_rebalance.planning.problem import Budget, Problem
from ep_rebalance.planning.proposal import planned_load
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology


class Serving(Protocol):
    """Something that serves snapshots: `ReplayedServer`, or one of its peers.

    placement, quotas_LP: what the last snapshot was served with.
    plans: all plans so far.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    plans: list[PlanMade]

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """Serve one more recorded snapshot."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a peer starts with.

    recorded: the placement at the beginning of the trace.
    contiguous: what the engine would load.
    expert_bytes_L: L sizes, bytes. One expert of each layer.
    eplb: of the scenario, see there.
    """

    recorded: Placement
    contiguous: Placement
    config: RebalanceConfig
    topology: Topology
    expert_bytes_L: Sequence[int]
    eplb: Eplb | None


class Peer(Serving, Protocol):
    """What an entry of REPLAY_POLICIES names."""

    @classmethod
    def of(cls, begin: Beginning) -> Self:
        """A server that has served nothing yet."""
        ...


class Contiguous:
    """The placement that the engine loads, with tokens split evenly: a server without the plugin."""

    def __init__(self, placement: Placement) -> None:
        self.placement, self.quotas_LP = placement, placement.even_quotas_LP()
        self.plans: list[PlanMade] = []

    @classmethod
    def of(cls, begin: Beginning) -> Self:
        """See `Peer`."""
        return cls(begin.contiguous)

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """Nothing changes."""


class AsRecorded(Contiguous):
    """What the recorded server served: its placements, with quotas fitted when it fitted them."""

    def __init__(self, placement: Placement, config: RebalanceConfig) -> None:
        super().__init__(placement)
        self._next_LP = self.quotas_LP
        self._since: tuple[int, int, float] | None = None
        self._fitted_LP: NDArray[np.float64] | None = None
        self._settings, self._cost = config.planner, cost_model(config)
        self._window = LoadWindow(config.window.snapshots)

    @classmethod
    def of(cls, begin: Beginning) -> Self:
        """See `Peer`."""
        return cls(begin.recorded, begin.config)

    def change(self, change: RecordedPlacement) -> None:
        """Serve the placement from the next snapshot on. Each file repeats the newest one, with the quotas
        that it had at first.
        """
        since = change.generation, change.step, change.time
        if since == self._since:
            return
        self._since, self.placement = since, change.placement
        # The server drops quotas that it is fitting when another placement is served.
        self._next_LP, self._fitted_LP = change.quotas_LP, None

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """Follow the server's quotas, see `BalancingLoop`."""
        self.quotas_LP = self._next_LP
        if not self.placement.num_redundant:
            return
        sample = snapshot.sample()
        self._window.append(sample)
        if snapshot.ended is not None:
            self._fitted_LP = None
        if snapshot.agreed.fitted and self._fitted_LP is not None:
            self._next_LP, self._fitted_LP = self._fitted_LP, None
        if self._fitted_LP is None and sample.routed:
            load = planned_load(self._settings, self._window.samples())
            self._fitted_LP = self._cost.split(load, self.placement)
        if snapshot.agreed.reloaded:
            self._window.clear()


class PlacedOnce(Contiguous):
    """The best placement for the first load that a server would plan for, kept from then on. Quotas follow
    the load.
    """

    def __init__(self, placement: Placement, config: RebalanceConfig, topology: Topology) -> None:
        super().__init__(placement)
        self._next, self._config, self._topology = placement, config, topology
        self._window = LoadWindow(config.window.snapshots)
        self._placed = False

    @classmethod
    def of(cls, begin: Beginning) -> Self:
        """See `Peer`."""
        return cls(begin.contiguous, begin.config, begin.topology)

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """Place the experts when a server would make its first plan."""
        self.placement = self._next
        self._window.append(snapshot.sample())
        if not len(self._window):
            return
        config = self._config
        load = planned_load(config.planner, self._window.samples())
        interval = config.planner.interval_snapshots
        if not self._placed and self._window.plan_is_due(config.window, interval):
            self._next, self._placed = place_anew(load, self._next, self._topology), True
        self.quotas_LP = split_quotas(self._next, load.load_LE)


class Hindsight(Contiguous):
    """A placement and quotas made for the very snapshots that they then serve: a bound that cannot be reached
    without knowing the future.
    """

    def __init__(self, placement: Placement, settings: PlannerConfig, topology: Topology) -> None:
        super().__init__(placement)
        self._contiguous, self._settings, self._topology = placement, settings, topology

    @classmethod
    def of(cls, begin: Beginning) -> Self:
        """See `Peer`."""
        return cls(begin.contiguous, begin.config.planner, begin.topology)

    def expect(self, snapshots: list[RecordedSnapshot]) -> None:
        """Place experts for the snapshots that come next."""
        window = LoadWindow(len(snapshots))
        for snapshot in snapshots:
            window.append(snapshot.sample())
        if len(window):
            load = planned_load(self._settings, window.samples())
            self.placement = place_anew(load, self._contiguous, self._topology)
            self.quotas_LP = split_quotas(self.placement, load.load_LE)


def place_anew(load: WindowLoad, current: Placement, topology: Topology) -> Placement:
    """The best placement that we can find for a window: the greedy one, improved without a budget."""
    start = plan_greedy(everything_may_move(load, current, topology))
    return plan_incremental(everything_may_move(load, start, topology))


def everything_may_move(load: WindowLoad, current: Placement, topology: Topology) -> Problem:
    """A problem whose budget allows any move."""
    budget = Budget(max_moved_slots=current.slots_LP.size, max_arrivals=current.slots_per_rank)
    return Problem(load=load, current=current, topology=topology, budget=budget)
