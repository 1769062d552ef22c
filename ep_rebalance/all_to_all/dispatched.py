"""The interface of all exchanges: what they take and return."""

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

    hidden_MH: [M, H]. Hidden states.
    slots_MK: integer [M, K]. Slots over all ranks, below 0 for none.
    weights_MK: float32 [M, K]. The router's.
    """

    hidden_MH: torch.Tensor
    slots_MK: torch.Tensor
    weights_MK: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """What a rank received and must compute, and what it needs to send the outputs home.

    rows_MH: [M, H]. Hidden states that arrived.
    local_slots_N: int32 [M * pairs_per_row]. Pair `n` belongs to row `n // pairs_per_row`; its slot within
        this rank, or -1 for a void pair, which is not computed.
    pair_weights_N: float32 [M * pairs_per_row]. The router's.
    may_be_void: whether there may be void pairs.
    weights_TK: float32 [T, K]. The router's, of this rank's own tokens.
    handle: how the rows came; for `combine`.
    """

    rows_MH: torch.Tensor
    local_slots_N: torch.Tensor
    pair_weights_N: torch.Tensor
    pairs_per_row: int
    may_be_void: bool
    weights_TK: torch.Tensor
    handle: Any


class AllToAll(Protocol):
    """Dispatch and combine, for one layout of slots over the ranks of a group.

    Both are collective: ranks without tokens take part in every call.
    """

    @classmethod
    def create(cls, config: RebalanceConfig, layout: Layout) -> Self:
        """Made as `data_plane` and `dispatch` say. Collective if it makes process groups."""

    def dispatch(
        self, hidden_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatched:
        """Send each token to the ranks of its slots.

        hidden_TH: [T, H]. Hidden states.
        slots_TK: integer [T, K]. Slots over all ranks, below 0 for padding.
        weights_TK: float32 [T, K]. The router's.

        A pair of padding is sent nowhere and adds nothing. A token with nothing else comes back as
        zeros, whatever its hidden state is.
        """

    def combine(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """Bring the experts' outputs home and write each token's weighted sum to `out_TH`.

        outputs_NH: [N, H]. Unweighted, one row per pair of `dispatched.local_slots_N`; those of void
            pairs may hold anything.
        out_TH: [T, H]. Written.
        """


def weighted_by_row(dispatched: Dispatched, outputs_NH: torch.Tensor) -> torch.Tensor:
    """float32 [M, pairs_per_row, H], outputs times the router's weights; 0 for void pairs."""
    shape = (len(dispatched.rows_MH), dispatched.pairs_per_row)
    void = (dispatched.local_slots_N < 0).view(*shape, 1)
    outputs = outputs_NH.view(*shape, outputs_NH.shape[1]).float()
    weighted = outputs * dispatched.pair_weights_N.view(*shape, 1)
    # Not a weight of 0: the output of a void pair may be NaN.
    return weighted.masked_fill(void, 0.0)
