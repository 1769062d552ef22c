"""Counts and dispatch tables on the device: what the forward pass reads and writes.

All memory is reserved here once; afterwards it is only written in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.kernels.route_and_count import (
    IGNORED,
    LayerTables,
    count_experts,
    route_and_count,
)
from ep_rebalance.placement import Placement
from ep_rebalance.planning.dispatch import dispatch_thresholds
from ep_rebalance.topology import Topology

HASH_STRIDE = 20_011
"""Added to the hash offset each step: coprime to 65536, so that every offset comes up."""


class DeviceCounts:
    """Counters of all layers, and the phase of each token of the step that runs.

    topology, rank: where the tokens are that it routes.
    counts_LAE: int64 [L, 3, E]; phase_T: int64 [max_tokens], IGNORED but for the tokens that a real
    step marks.
    """

    def __init__(
        self,
        *,
        placement: Placement,
        max_tokens: int,
        device: torch.device,
        topology: Topology,
        rank: int,
        counts_here: bool = True,
    ) -> None:
        layers, experts = placement.num_layers, placement.num_experts
        self.counts_LAE = torch.zeros(layers, 3, experts, dtype=torch.int64, device=device)
        self._replica_slots = torch.empty(
            layers, experts, placement.max_replicas, dtype=torch.int32, device=device
        )
        self._thresholds = torch.empty_like(self._replica_slots)
        self.layers = tuple(
            LayerTables(
                counts_AE=self.counts_LAE[layer],
                replica_slots_EC=self._replica_slots[layer],
                thresholds_EC=self._thresholds[layer],
            )
            for layer in range(layers)
        )
        self.phase_T = torch.full((max_tokens,), IGNORED, dtype=torch.int64, device=device)
        self._marked = 0
        self._counts_here = counts_here
        self._topology, self._rank = topology, rank
        self.offset = torch.zeros(1, dtype=torch.int64, device=device)

    def mark_tokens(self, phases_T: NDArray[np.int64]) -> None:
        """Set the phase of the coming step's tokens; all others stay IGNORED.

        Every token must be counted on exactly one rank: where ranks share their tokens (tensor
        parallelism without sequence parallelism) only one of them is built with `counts_here`.
        """
        if not self._counts_here:
            return
        self.phase_T[: self._marked].fill_(IGNORED)
        self._marked = len(phases_T)
        self.phase_T[: self._marked].copy_(torch.from_numpy(phases_T))

    def end_step(self) -> None:
        """Forget the step's tokens, so that dummy and warm-up steps count nothing."""
        self.phase_T[: self._marked].fill_(IGNORED)
        self._marked = 0
        self.offset += HASH_STRIDE

    def route(self, layer: int, topk_ids_TK: torch.Tensor, first_token: int) -> torch.Tensor:
        """Count one layer's top-k ids and turn them into slots.

        first_token: where this rank's rows start in the batch that `mark_tokens` described.
        """
        phase_T = self.phase_T[first_token : first_token + topk_ids_TK.shape[0]]
        return route_and_count(topk_ids_TK, phase_T, self.layers[layer], self.offset)

    def count(self, layer: int, topk_ids_TK: torch.Tensor, first_token: int) -> None:
        """Count only."""
        phase_T = self.phase_T[first_token : first_token + topk_ids_TK.shape[0]]
        count_experts(topk_ids_TK, phase_T, self.layers[layer].counts_AE)

    def set_dispatch(
        self, layers: Sequence[int], placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> None:
        """Swap the dispatch tables of `layers`, in place and in stream order."""
        if not layers:
            return
        slots_NEC, thresholds_NEC = dispatch_thresholds(
            placement, layers, quotas_LP, topology=self._topology, rank=self._rank
        )
        for index, layer in enumerate(layers):
            slots_EC = torch.from_numpy(slots_NEC[index])
            thresholds_EC = torch.from_numpy(thresholds_NEC[index])
            self._replica_slots[layer].copy_(slots_EC, non_blocking=True)
            self._thresholds[layer].copy_(thresholds_EC, non_blocking=True)

    def thresholds(self, placement: Placement, quotas_LP: NDArray[np.float64]) -> NDArray[np.int32]:
        """int32 [L, E, C], what `set_thresholds` takes for all layers; may run in any thread."""
        _, thresholds_LEC = dispatch_thresholds(
            placement,
            range(placement.num_layers),
            quotas_LP,
            topology=self._topology,
            rank=self._rank,
        )
        return thresholds_LEC

    def set_thresholds(self, thresholds_LEC: NDArray[np.int32]) -> None:
        """Split tokens anew over the replicas that are there, in place and in stream order."""
        self._thresholds.copy_(torch.from_numpy(thresholds_LEC), non_blocking=True)
