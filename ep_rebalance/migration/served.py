"""Served: what the forward pass runs on, and how migrations and reloads change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """A placement, the quotas of its replicas, and its number.

    quotas_LP: float64 [L, P].
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    generation: int

    @classmethod
    def initial(cls, placement: Placement, generation: int = 0) -> Served:
        """Tokens split evenly over the replicas."""
        return cls(placement=placement, quotas_LP=placement.even_quotas_LP(), generation=generation)

    def with_layers(
        self, layers: Sequence[int], placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> Served:
        """After `layers` changed.

        placement: of all layers, from then on.
        quotas_LP: [L, P]; only those of `layers` are taken.
        """
        quotas = self.quotas_LP.copy()
        quotas[list(layers)] = quotas_LP[list(layers)]
        return replace(self, placement=placement, quotas_LP=quotas)

    def with_quotas(self, quotas_LP: NDArray[np.float64]) -> Served:
        """Tokens split otherwise; no expert moved."""
        return replace(self, quotas_LP=quotas_LP)

    def numbered(self, before: Placement) -> Served:
        """At the end of a migration that began with `before`: the next generation if experts moved."""
        moved = self.placement != before
        return replace(self, generation=self.generation + int(moved))

    def reloaded(self, layers: Sequence[int], loaded: Served) -> Served:
        """The engine wrote `layers` anew: they are as they were loaded, under the next generation."""
        placement = self.placement.replaced(layers, loaded.placement)
        after = self.with_layers(layers, placement, loaded.quotas_LP)
        return replace(after, generation=self.generation + 1)
