"""Tokens to the ranks that hold their experts, and the outputs back: exact splits over
`torch.distributed`.

A token is sent once to each rank that holds one of its experts. What comes back depends on
`combine`: `exact` returns one row per expert and sums at the token's own rank in top-k order and
float32, so that the result is the same bits wherever the experts sit; `fast` sums at the rank that
computed and returns one row per token. The number of rows that go to each rank is read on the host,
so this form is for eager execution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

Combine = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """What a rank received and must compute, and what it needs to send the outputs home.

    rows_NH: [N, H], one row per (token, expert) pair whose expert sits on this rank.
    local_slots_N: int32 [N], slot of the pair within this rank.
    pair_weights_N: float32 [N], router weight of the pair.
    received_row_N: int64 [N], which received token a pair belongs to.
    sent_*: this rank's own tokens in the order in which they were sent, by destination rank.
    """

    rows_NH: torch.Tensor
    local_slots_N: torch.Tensor
    pair_weights_N: torch.Tensor
    received_row_N: torch.Tensor
    received_rows_R: list[int]
    received_pairs_R: list[int]
    sent_tokens: torch.Tensor
    sent_rows_R: list[int]
    sent_pair_position: torch.Tensor
    sent_pairs_R: list[int]
    weights_TK: torch.Tensor


class AllToAll:
    """Dispatch and combine for one layout of slots over the ranks of `group`."""

    def __init__(self, *, group: dist.ProcessGroup, slots_per_rank: int, combine: Combine) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._slots_per_rank = slots_per_rank
        self._combine: Combine = combine

    def dispatch(
        self, hidden_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatched:
        """Send each token to the ranks of its slots.

        hidden_TH: [T, H]; slots_TK: integer [T, K], slot numbers over all ranks; weights_TK:
        float32 [T, K].
        """
        rank_TK = torch.div(slots_TK, self._slots_per_rank, rounding_mode="floor").long()
        goes_TR = torch.zeros(len(rank_TK), self._size, dtype=torch.bool).scatter_(1, rank_TK, True)
        destination, token = goes_TR.t().nonzero(as_tuple=True)
        rows_R = goes_TR.sum(0)
        received_rows = torch.empty_like(rows_R)
        dist.all_to_all_single(received_rows, rows_R, group=self._group)
        sent_rows_R, received_rows_R = rows_R.tolist(), received_rows.tolist()

        wire = _pack(hidden_TH[token], slots_TK[token], weights_TK[token])
        arrived = wire.new_empty(sum(received_rows_R), wire.shape[1])
        dist.all_to_all_single(arrived, wire, received_rows_R, sent_rows_R, group=self._group)

        hidden, slots, weights = _unpack(arrived, hidden_TH, slots_TK.shape[1])
        local = slots - self._rank * self._slots_per_rank
        here = (local >= 0) & (local < self._slots_per_rank)
        row, k = here.nonzero(as_tuple=True)
        pairs_per_row = here.sum(1)
        sent_pairs = rank_TK[token] == destination.unsqueeze(1)
        sent_row, sent_k = sent_pairs.nonzero(as_tuple=True)
        return Dispatched(
            rows_NH=hidden[row],
            local_slots_N=local[row, k],
            pair_weights_N=weights[row, k],
            received_row_N=row,
            received_rows_R=received_rows_R,
            received_pairs_R=_sum_by_rank(pairs_per_row, received_rows_R),
            sent_tokens=token,
            sent_rows_R=sent_rows_R,
            sent_pair_position=token[sent_row] * slots_TK.shape[1] + sent_k,
            sent_pairs_R=_sum_by_rank(sent_pairs.sum(1), sent_rows_R),
            weights_TK=weights_TK,
        )

    def combine(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """Bring the experts' outputs home and write each token's weighted sum to `out_TH`.

        outputs_NH: [N, H], unweighted, in the order of `dispatched.rows_NH`.
        """
        if self._combine == "exact":
            self._combine_exact(dispatched, outputs_NH, out_TH)
        else:
            self._combine_fast(dispatched, outputs_NH, out_TH)

    def _combine_exact(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        num_tokens, top_k = dispatched.weights_TK.shape
        hidden = outputs_NH.shape[1]
        home = outputs_NH.new_empty(sum(dispatched.sent_pairs_R), hidden)
        self._return(home, outputs_NH, dispatched.sent_pairs_R, dispatched.received_pairs_R)
        by_pair = home.new_empty(num_tokens * top_k, hidden)
        by_pair[dispatched.sent_pair_position] = home
        out_TH.copy_(weighted_sum(by_pair.view(num_tokens, top_k, hidden), dispatched.weights_TK))

    def _combine_fast(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        weighted = outputs_NH.float() * dispatched.pair_weights_N.unsqueeze(1)
        partial = weighted.new_zeros(sum(dispatched.received_rows_R), outputs_NH.shape[1])
        partial.index_add_(0, dispatched.received_row_N, weighted)
        home = outputs_NH.new_empty(sum(dispatched.sent_rows_R), outputs_NH.shape[1])
        rows_R, sent_R = dispatched.received_rows_R, dispatched.sent_rows_R
        self._return(home, partial.to(outputs_NH.dtype), sent_R, rows_R)
        total = weighted.new_zeros(out_TH.shape)
        total.index_add_(0, dispatched.sent_tokens, home.float())
        out_TH.copy_(total)

    def _return(
        self, home: torch.Tensor, outputs: torch.Tensor, home_splits: list[int], splits: list[int]
    ) -> None:
        dist.all_to_all_single(home, outputs.contiguous(), home_splits, splits, group=self._group)


def weighted_sum(outputs_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Sum over K in ascending order in float32; float32 [T, H].

    Each addition is one fused multiply-add, as in vLLM's CPU kernel (csrc/cpu/cpu_fused_moe.cpp).
    """
    total = outputs_TKH[:, 0].float() * weights_TK[:, :1].float()
    for k in range(1, outputs_TKH.shape[1]):
        total = torch.addcmul(total, outputs_TKH[:, k].float(), weights_TK[:, k : k + 1].float())
    return total


def _pack(hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Hidden state, slots and weights of each row as bytes side by side: one collective carries all
    three.
    """
    parts = (hidden, slots.to(torch.int32), weights.to(torch.float32))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def _unpack(
    wire: torch.Tensor, like_TH: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_bytes = like_TH.shape[1] * like_TH.element_size()
    hidden, slots, weights = wire.split([hidden_bytes, 4 * top_k, 4 * top_k], dim=1)
    return (
        hidden.contiguous().view(like_TH.dtype),
        slots.contiguous().view(torch.int32),
        weights.contiguous().view(torch.float32),
    )


def _sum_by_rank(values: torch.Tensor, rows_R: list[int]) -> list[int]:
    return [int(part.sum()) for part in values.split(rows_R)]
