"""What a planner is given and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import CostModel, TokenCost
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds on what one plan may change.

    max_moved_slots: over all layers and ranks.
    max_arrivals: on one rank in one layer; what the staging memory holds.
    """

    max_moved_slots: int
    max_arrivals: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """All that a planner may know.

    cost: what is to be balanced.
    internode_token_price: cost of a token that crosses a node boundary, in those of computing it.
    seed: of every tie. threads: layers that are planned at the same time; does not change the plan.
    """

    load: WindowLoad
    current: Placement
    topology: Topology
    budget: Budget
    cost: CostModel = field(default_factory=TokenCost)
    internode_token_price: float = 0.0
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A target placement with the quotas to serve it with.

    quotas_LP: float64 [L, P], part of its expert's tokens that a slot receives; sums to 1 over an
    expert's slots.
    unmoved_quotas_LP: the same for the current placement, fitted to the same load.
    imbalance_before_L, imbalance_after_L: float64 [L], max/mean rank cost predicted on the window
        without and with the plan.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    unmoved_quotas_LP: NDArray[np.float64]
    imbalance_before_L: NDArray[np.float64]
    imbalance_after_L: NDArray[np.float64]
    moved_slots: int

    @property
    def promised(self) -> float:
        """Part of the busiest ranks' cost, summed over layers, that the plan saves on the window."""
        return float(1.0 - self.imbalance_after_L.sum() / self.imbalance_before_L.sum())


class Planner(Protocol):
    """A pure function: no clock, no torch, no unseeded randomness."""

    def __call__(self, problem: Problem) -> Placement:
        """A placement within the budget, slots aligned with the current one: an expert that stays
        on a rank stays in its slot.
        """
        ...
