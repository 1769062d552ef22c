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

    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives.
    generation: the number. A migration that moves experts adds one at its end, a reload of weights too.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    generation: int

    @classmethod
    def initial(cls, placement: Placement, generation: int = 0) -> Served:
        """A placement with tokens split evenly over its replicas."""
        return cls(placement=placement, quotas_LP=placement.even_quotas_LP(), generation=generation)

    def with_layers(
        self, layers: Sequence[int], placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> Served:
        """What is served once `layers` have changed.

        placement: of all layers, from then on.
        quotas_LP: float64 [L, P]. Only those of `layers` are used.
        """
        quotas = self.quotas_LP.copy()
        quotas[list(layers)] = quotas_LP[list(layers)]
        return replace(self, placement=placement, quotas_LP=quotas)

    def with_quotas(self, quotas_LP: NDArray[np.float64]) -> Served:
        """The same placement with tokens split differently."""
        return replace(self, quotas_LP=quotas_LP)

    def numbered(self, before: Placement) -> Served:
        """The same at the end of a migration from `before`: the next generation, if experts moved."""
        moved = self.placement != before
        return replace(self, generation=self.generation + int(moved))

    def reloaded(self, layers: Sequence[int], loaded: Served) -> Served:
        """What is served once the engine has written `layers` anew: they are as loaded, under the next
        generation.
        """
        placement = self.placement.replaced(layers, loaded.placement)
        after = self.with_layers(layers, placement, loaded.quotas_LP)
        return replace(after, generation=self.generation + 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedTokens:
    """Tokens, and what served them.

    counts_ALE: int64 [A, L, E], tokens. As in `LoadSample`.
    """

    counts_ALE: NDArray[np.int64]
    served: Served
