"""The exchange that is easiest to see through: every rank gets all rows, and outputs are added up on all."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from ep_rebalance.all_to_all.dispatched import Combine, Dispatched, Rows, weighted_by_row
from ep_rebalance.all_to_all.layout import Layout
from ep_rebalance.all_to_all.wire import pack_rows, unpack_rows
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.kernels.weighted_sum import weighted_sum


class Gathered:
    """See `AllToAll`."""

    def __init__(self, *, group: Any, slots_per_rank: int, combine: Combine) -> None:
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._slots_per_rank = slots_per_rank
        self._combine: Combine = combine

    @classmethod
    def create(cls, config: RebalanceConfig, layout: Layout) -> Gathered:
        """See `AllToAll`."""
        return cls(
            group=layout.group,
            slots_per_rank=layout.slots_per_rank,
            combine=config.dispatch.combine,
        )

    def dispatch(
        self, hidden_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatched:
        """See `AllToAll`."""
        own = Rows(hidden_MH=hidden_TH, slots_MK=slots_TK, weights_MK=weights_TK)
        counts_R = self._gather(torch.tensor([len(hidden_TH)])).tolist()
        wire = pack_rows(own, "full")
        padded = wire.new_zeros(max(counts_R), wire.shape[1])
        padded[: len(wire)] = wire
        parts = self._gather(padded).view(self._size, *padded.shape)
        arrived = torch.cat([part[:n] for part, n in zip(parts, counts_R, strict=True)])
        received = unpack_rows(arrived, own, "full")
        local_MK = received.slots_MK - self._rank * self._slots_per_rank
        here_MK = (local_MK >= 0) & (local_MK < self._slots_per_rank)
        start = [0, *accumulate(counts_R)][self._rank]
        return Dispatched(
            rows_MH=received.hidden_MH,
            local_slots_N=local_MK.masked_fill(~here_MK, -1).flatten(),
            pair_weights_N=received.weights_MK.flatten(),
            pairs_per_row=slots_TK.shape[1],
            may_be_void=True,
            weights_TK=weights_TK,
            handle=(slots_TK, slice(start, start + len(hidden_TH))),
        )

    def combine(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """See `AllToAll`."""
        slots_TK, own = dispatched.handle
        if self._combine == "fast":
            out_TH.copy_(self._add_up(weighted_by_row(dispatched, outputs_NH).sum(1))[own])
            return
        void_N1 = (dispatched.local_slots_N < 0).unsqueeze(1)
        outputs = self._add_up(outputs_NH.float().masked_fill(void_N1, 0.0))
        pairs = dispatched.pairs_per_row
        outputs = outputs[own.start * pairs : own.stop * pairs]
        position_TK = torch.arange(slots_TK.numel()).view(slots_TK.shape)
        position_TK = position_TK.masked_fill(slots_TK < 0, -1)
        out_TH.copy_(weighted_sum(outputs.to(outputs_NH.dtype), position_TK, dispatched.weights_TK))

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """[ranks * len(part), ...]"""
        parts = [torch.empty_like(part) for _ in range(self._size)]
        if part.numel():
            dist.all_gather(parts, part, group=self._group)
        return torch.cat(parts)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        if values.numel():
            dist.all_reduce(values, group=self._group)
        return values
