"""What a planner is given, and what it returns."""

from __future__ import annotations

import math
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

    max_moved_slots: slots. In all layers and on all ranks together.
    max_arrivals: experts. On one rank in one layer; the staging memory must have room for them.
    """

    max_moved_slots: int
    max_arrivals: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Everything that a planner may know.

    cost: what is to be balanced.
    internode_token_price: what a token costs that crosses a node boundary, as a multiple of what it
        costs to compute it.
    seed: for planners that break ties at random.
    threads: how many layers to plan at the same time; the plan does not depend on it.

    Raises PlacementError if ranks have unequally many slots: planners take all for alike.
    """

    load: WindowLoad
    current: Placement
    topology: Topology
    budget: Budget
    cost: CostModel = field(default_factory=TokenCost)
    internode_token_price: float = 0.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        _ = self.current.slots_per_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A target placement with the quotas to serve it with.

    quotas_LP: float64 [L, P]. The share of its expert's tokens that a slot receives; the quotas of an
        expert's slots sum to 1.
    unmoved_quotas_LP: float64 [L, P]. The same for the current placement, fitted to the same load.
    imbalance_before_L: float64 [L], max/mean rank cost. Predicted on the window without the plan.
    imbalance_after_L: float64 [L], max/mean rank cost. Predicted on the window with the plan.
    moved_slots: slots whose expert the plan changes.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    unmoved_quotas_LP: NDArray[np.float64]
    imbalance_before_L: NDArray[np.float64]
    imbalance_after_L: NDArray[np.float64]
    moved_slots: int

    @property
    def promised(self) -> float:
        """The fraction of the busiest ranks' cost, summed over layers, that the plan saves on the window."""
        return float(1.0 - self.imbalance_after_L.sum() / self.imbalance_before_L.sum())

    def check(self, current: Placement) -> None:
        """Raises ValueError for numbers that are not finite, and for quotas that are none.

        current: what the plan would replace.
        """
        for imbalance_L in (self.imbalance_before_L, self.imbalance_after_L):
            if not np.isfinite(imbalance_L).all():
                raise ValueError(
                    f"a plan predicts an imbalance of {imbalance_L[~np.isfinite(imbalance_L)][0]}"
                )
        if not math.isfinite(self.promised):
            raise ValueError(f"a plan promises {self.promised} of the busiest ranks' cost")
        self.placement.check_quotas(self.quotas_LP)
        current.check_quotas(self.unmoved_quotas_LP)


class Planner(Protocol):
    """A pure function: no clock, no torch, no unseeded randomness."""

    def __call__(self, problem: Problem) -> Placement:
        """A placement within the budget, aligned with the current one: an expert that stays on a
        rank stays in its slot.
        """
        ...
