"""Exact splits: sends just the rows there are, directly or by way of the destination's node.

Their number is read on the host, so this exchange cannot be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ep_rebalance.all_to_all.dispatched import Combine, Dispatched, Rows, weighted_by_row
from ep_rebalance.all_to_all.layout import Layout, NodeGroups
from ep_rebalance.all_to_all.wire import Payload, pack_rows, unpack_rows
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.kernels.weighted_sum import weighted_sum


class ExactSplits:
    """See `AllToAll`.

    nodes: if given, a token is sent once to each node, and from there to that node's ranks.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        combine: Combine,
        payload: Payload = "full",
        nodes: NodeGroups | None = None,
    ) -> None:
        rank = dist.get_rank(group)
        self._combine: Combine = combine
        self._first_slot = rank * slots_per_rank
        if nodes is None:
            self._hops = [_Hop(group, slots_per_rank, 0, payload)]
        else:
            size = nodes.ranks_per_node
            # First to the rank of the same place in the slot's node, as if a node were one rank with all
            # its slots; then within the node, whose first rank is rank // size * size.
            self._hops = [
                _Hop(nodes.between, slots_per_rank * size, 0, payload),
                _Hop(nodes.within, slots_per_rank, rank // size * size, payload),
            ]

    @classmethod
    def create(cls, config: RebalanceConfig, layout: Layout) -> ExactSplits:
        """See `AllToAll`."""
        return cls(
            group=layout.group,
            slots_per_rank=layout.slots_per_rank,
            combine=config.dispatch.combine,
            payload=config.data_plane.payload,
            nodes=layout.nodes,
        )

    def dispatch(
        self, hidden_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatched:
        """See `AllToAll`."""
        rows = Rows(hidden_MH=hidden_TH, slots_MK=slots_TK, weights_MK=weights_TK)
        legs = []
        for hop in self._hops:
            rows, leg = hop.send(rows)
            legs.append(leg)
        row, k = legs[-1].here_MK.nonzero(as_tuple=True)
        return Dispatched(
            rows_MH=rows.hidden_MH[row],
            local_slots_N=rows.slots_MK[row, k] - self._first_slot,
            pair_weights_N=rows.weights_MK[row, k],
            pairs_per_row=1,
            may_be_void=False,
            weights_TK=weights_TK,
            handle=legs,
        )

    def combine(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """See `AllToAll`."""
        if self._combine == "exact":
            out_TH.copy_(self._sum_at_home(dispatched, outputs_NH))
        else:
            out_TH.copy_(self._sum_on_the_way(dispatched, outputs_NH))

    def _sum_at_home(self, dispatched: Dispatched, outputs_NH: torch.Tensor) -> torch.Tensor:
        """Each hop, last one first, returns the outputs of all pairs to where their row came from."""
        legs = dispatched.handle
        for i in reversed(range(1, len(legs))):
            home, position_MK = self._hops[i].return_pairs(legs[i], outputs_NH)
            outputs_NH = home[position_MK[legs[i - 1].here_MK]]
        home, position_TK = self._hops[0].return_pairs(legs[0], outputs_NH)
        return weighted_sum(home, position_TK, dispatched.weights_TK)

    def _sum_on_the_way(self, dispatched: Dispatched, outputs_NH: torch.Tensor) -> torch.Tensor:
        """Each hop, last one first, adds up what the ranks that a row was sent to made of it."""
        legs, dtype = dispatched.handle, outputs_NH.dtype
        row = legs[-1].here_MK.nonzero(as_tuple=True)[0]
        weighted = weighted_by_row(dispatched, outputs_NH)[:, 0]
        sums = weighted.new_zeros(len(legs[-1].here_MK), weighted.shape[1])
        sums.index_add_(0, row, weighted)
        for hop, leg in zip(reversed(self._hops), reversed(legs), strict=True):
            sums = hop.return_sums(leg, sums.to(dtype))
        return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leg:
    """One hop of one step, with N sent and M arrived rows. Both are sorted by the rank at the other end.

    here_MK: bool [M, K]. Which pairs of the arrived rows this rank, or its node, computes.
    row: int64 [N]. The row of which each sent row is a copy.
    mine_NK: bool [N, K]. Which of its pairs each sent row was sent for.
    rows: number of rows before they were copied.
    sent_R, arrived_R: rows to and from each member of the group.
    """

    here_MK: torch.Tensor
    row: torch.Tensor
    mine_NK: torch.Tensor
    rows: int
    sent_R: list[int]
    arrived_R: list[int]


class _Hop:
    """Sends rows to the members of a group that hold their slots.

    slots_each: slots of each member; members hold consecutive ones.
    first: how many times `slots_each` slots lie before those of the group's first member.
    """

    def __init__(
        self, group: dist.ProcessGroup, slots_each: int, first: int, payload: Payload
    ) -> None:
        self._group = group
        self._member = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._slots_each = slots_each
        self._first = first
        self._payload: Payload = payload

    def send(self, rows: Rows) -> tuple[Rows, _Leg]:
        """Send each row to all members that hold a slot of it. Returns what arrives here."""
        member_MK = self._member_of(rows.slots_MK)
        goes_RM = self._goes_to(member_MK)
        destination, row = goes_RM.nonzero(as_tuple=True)
        sent = goes_RM.sum(1)
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=self._group)
        sent_R, arrived_R = sent.tolist(), arrived.tolist()  # the host waits for the device here

        copies = Rows(
            hidden_MH=rows.hidden_MH[row],
            slots_MK=rows.slots_MK[row],
            weights_MK=rows.weights_MK[row],
        )
        received = unpack_rows(
            self._exchange(pack_rows(copies, self._payload), sent_R, arrived_R), rows, self._payload
        )
        leg = _Leg(
            here_MK=self._member_of(received.slots_MK) == self._member,
            row=row,
            mine_NK=member_MK[row] == destination.unsqueeze(1),
            rows=len(member_MK),
            sent_R=sent_R,
            arrived_R=arrived_R,
        )
        return received, leg

    def return_pairs(self, leg: _Leg, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(outputs, positions): all pairs' outputs that come back here, and the row of each pair's among
        them, int64 [leg.rows, K], -1 for a pair that was not sent.

        outputs: one row for each pair of `leg.here_MK`, in order.
        """
        splits = _sum_by_rank(leg.here_MK.sum(1), leg.arrived_R)
        home_splits = _sum_by_rank(leg.mine_NK.sum(1), leg.sent_R)
        home = self._exchange(outputs.contiguous(), splits, home_splits)
        sent_row, k = leg.mine_NK.nonzero(as_tuple=True)
        top_k = leg.mine_NK.shape[1]
        position = torch.full((leg.rows * top_k,), -1, device=home.device)
        position[leg.row[sent_row] * top_k + k] = torch.arange(len(home), device=home.device)
        return home, position.view(-1, top_k)

    def return_sums(self, leg: _Leg, sums: torch.Tensor) -> torch.Tensor:
        """float32 [leg.rows, H], the sum of what came back for each row.

        sums: one row for each row that arrived.
        """
        home = self._exchange(sums, leg.arrived_R, leg.sent_R)
        total = torch.zeros(leg.rows, sums.shape[1], dtype=torch.float32, device=sums.device)
        return total.index_add_(0, leg.row, home.float())

    def _member_of(self, slots_MK: torch.Tensor) -> torch.Tensor:
        # Floored, so that slots below 0 belong to member -1, which is nobody.
        member = torch.div(slots_MK, self._slots_each, rounding_mode="floor").long()
        return member - self._first if self._first else member

    def _goes_to(self, member_MK: torch.Tensor) -> torch.Tensor:
        """bool [R, M], whether a row goes to a member."""
        # One row more for slots that no member holds.
        known_MK = (member_MK >= 0) & (member_MK < self._size)
        goes_RM = known_MK.new_zeros(self._size + 1, len(member_MK))
        row_M1 = torch.arange(len(member_MK), device=member_MK.device).unsqueeze(1)
        goes_RM[torch.where(known_MK, member_MK, self._size), row_M1] = True
        return goes_RM[:-1]

    def _exchange(self, rows: torch.Tensor, splits: list[int], arriving: list[int]) -> torch.Tensor:
        out = rows.new_empty(sum(arriving), rows.shape[1])
        dist.all_to_all_single(out, rows, arriving, splits, group=self._group)
        return out


def _sum_by_rank(values: torch.Tensor, rows_R: list[int]) -> list[int]:
    # Of all ranks at once: an operation for each would take a thousand ranks milliseconds in every layer.
    ends_R = torch.tensor([0, *rows_R], device=values.device).cumsum(0)
    before = torch.cat([values.new_zeros(1), values]).cumsum(0)
    sums: list[int] = before[ends_R].diff().tolist()
    return sums
