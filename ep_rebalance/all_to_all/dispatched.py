"""What every exchange takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch

from ep_rebalance.all_to_all.layout import Layout
from ep_rebalance.config import RebalanceConfig

Combine = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Tokens with their experts.

    hidden_MH: [M, H]. slots_MK: integer [M, K], slot numbers over all ranks, below 0 for no slot.
    weights_MK: float32 [M, K], of the router.
    """

    hidden_MH: torch.Tensor
    slots_MK: torch.Tensor
    weights_MK: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """What a rank received and must compute, and what it needs to send the outputs home.

    rows_MH: [M, H], the rows that arrived. local_slots_N: int32 [M * pairs_per_row], pair n is of row
    `n // pairs_per_row` and of this slot within the rank, or of none if it is -1. pair_weights_N:
    float32, of the router. may_be_void: whether any pair may be of none. weights_TK: of this rank's own
    tokens. handle: for `combine`, how the rows came.
    """

    rows_MH: torch.Tensor
    local_slots_N: torch.Tensor
    pair_weights_N: torch.Tensor
    pairs_per_row: int
    may_be_void: bool
    weights_TK: torch.Tensor
    handle: Any


class AllToAll(Protocol):
    """Dispatch and combine for one layout of slots over the ranks of a group."""

    @classmethod
    def create(cls, config: RebalanceConfig, layout: Layout) -> Self:
        """As `data_plane` and `dispatch` say. Collective if it makes groups of its own."""

    def dispatch(
        self, hidden_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatched:
        """Send each token to the ranks of its slots.

        hidden_TH: [T, H]; slots_TK: integer [T, K], slot numbers over all ranks; weights_TK:
        float32 [T, K]. Slots below 0 are padding: such a pair is sent nowhere and adds nothing, so a
        row of nothing else comes back as zeros, whatever it holds.
        """

    def combine(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """Bring the experts' outputs home and write each token's weighted sum to `out_TH`.

        outputs_NH: [N, H], unweighted, one row per pair of `dispatched.local_slots_N`; those of no
        slot may hold anything.
        """


def weighted_by_row(dispatched: Dispatched, outputs_NH: torch.Tensor) -> torch.Tensor:
    """float32 [M, P, H], outputs times router weights; zero for pairs of no slot."""
    shape = (len(dispatched.rows_MH), dispatched.pairs_per_row)
    void = (dispatched.local_slots_N < 0).view(*shape, 1)
    outputs = outputs_NH.view(*shape, outputs_NH.shape[1]).float()
    weighted = outputs * dispatched.pair_weights_N.view(*shape, 1)
    return weighted.masked_fill(void, 0.0)
