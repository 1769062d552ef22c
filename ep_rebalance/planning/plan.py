"""What a planner is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds on what one plan may change.

    max_moved_slots: over all layers and ranks.
    max_arrivals: on one rank in one layer; what the staging memory holds.
    """

    max_moved_slots: int
    max_arrivals: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A target placement with the quotas to serve it with.

    quotas_LP: float64 [L, P], part of its expert's tokens that a slot receives; sums to 1 over an
    expert's slots.
    imbalance_before_L, imbalance_after_L: float64 [L], max/mean rank load predicted on the window
        without and with the plan.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    imbalance_before_L: NDArray[np.float64]
    imbalance_after_L: NDArray[np.float64]
    moved_slots: int


class Planner(Protocol):
    """A pure function of its arguments: no clock, no torch, no unseeded randomness."""

    def __call__(
        self,
        samples_WLE: NDArray[np.float64],
        current: Placement,
        topology: Topology,
        budget: Budget,
        seed: int,
    ) -> Placement:
        """samples_WLE: float64 [W, L, E], tokens per logical expert in each snapshot, oldest first.

        Returns a placement within `budget` of `current`, slots aligned so that an expert that stays
        on a rank stays in its slot.
        """
        ...
