"""Fixed capacity: buffers of one size, for CUDA graphs, which cannot ask how many rows there are.

A round has room for `capacity` rows from each rank to each other. What does not fit is sent in further
rounds, so that no token is ever dropped. Outside a graph, the ranks first agree on capacity and rounds
with one all-reduce of two numbers. Within a graph, nothing is read on the host: all ranks must hold
equally many tokens, as vLLM pads them, and there are enough rounds for all of them to go to one rank.

A *place* is a row of the rounds' buffers, counted over all rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ep_rebalance.all_to_all.dispatched import Combine, Dispatched, Rows, weighted_by_row
from ep_rebalance.all_to_all.layout import Layout
from ep_rebalance.all_to_all.wire import Payload, pack_rows, unpack_rows
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.kernels.weighted_sum import weighted_sum


class FixedCapacity:
    """See `AllToAll`.

    capacity_factor: size of the buffers; 1 is what each rank gets if all get equally many rows.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        combine: Combine,
        capacity_factor: float,
        payload: Payload = "full",
    ) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self._first_slot = dist.get_rank(group) * slots_per_rank
        self._slots_per_rank = slots_per_rank
        self._combine: Combine = combine
        self._factor = capacity_factor
        self._payload: Payload = payload

    @classmethod
    def create(cls, config: RebalanceConfig, layout: Layout) -> FixedCapacity:
        """See `AllToAll`."""
        return cls(
            group=layout.group,
            slots_per_rank=layout.slots_per_rank,
            combine=config.dispatch.combine,
            capacity_factor=config.data_plane.capacity_factor,
            payload=config.data_plane.payload,
        )

    def dispatch(
        self, hidden_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatched:
        """See `AllToAll`."""
        rows = Rows(hidden_MH=hidden_TH, slots_MK=slots_TK, weights_MK=weights_TK)
        queue = _queue(slots_TK, self._slots_per_rank, self._size)
        plan = self._agree(queue)
        place_TK = plan.place(queue, self._size)
        wire = self._fill(rows, place_TK, plan)
        arrived = torch.cat([self._exchange(part) for part in wire.unbind(0)])
        received = unpack_rows(arrived, rows, self._payload)
        pairs = min(slots_TK.shape[1], self._slots_per_rank)
        local_MP, weights_MP = self._own_pairs(received, pairs)
        return Dispatched(
            rows_MH=received.hidden_MH,
            local_slots_N=local_MP.flatten(),
            pair_weights_N=weights_MP.flatten(),
            pairs_per_row=pairs,
            may_be_void=True,
            weights_TK=weights_TK,
            handle=_Handle(place_TK=place_TK, pair_TK=queue.pair_TK, plan=plan),
        )

    def combine(
        self, dispatched: Dispatched, outputs_NH: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """See `AllToAll`."""
        handle, pairs = dispatched.handle, dispatched.pairs_per_row
        # Rows come back in the places in which they were sent.
        if self._combine == "exact":
            home = self._return(outputs_NH.view(len(dispatched.rows_MH), -1), handle.plan)
            outputs = home.view(-1, outputs_NH.shape[1])
            position_TK = handle.place_TK * pairs + handle.pair_TK
            position_TK = position_TK.masked_fill(handle.place_TK < 0, -1)
            out_TH.copy_(weighted_sum(outputs, position_TK, dispatched.weights_TK))
        else:
            sums = weighted_by_row(dispatched, outputs_NH).sum(1).to(outputs_NH.dtype)
            # A rank's sum counts once, not once for each of the token's pairs there.
            once_TK = handle.place_TK.masked_fill(handle.pair_TK > 0, -1)
            ones_TK = torch.ones_like(dispatched.weights_TK)
            out_TH.copy_(weighted_sum(self._return(sums, handle.plan), once_TK, ones_TK))

    def _agree(self, queue: _Queue) -> _Plan:
        tokens, top_k = queue.rank_TK.shape
        if _is_captured(queue.rank_TK):
            capacity = self._capacity(tokens, top_k)
            return _Plan(capacity=capacity, rounds=-(-tokens // capacity))
        wanted = torch.stack([queue.longest(), queue.tokens()])
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        most_rows, most_tokens = wanted.tolist()
        capacity = self._capacity(most_tokens, top_k)
        return _Plan(capacity=capacity, rounds=max(1, -(-most_rows // capacity)))

    def _capacity(self, tokens: int, top_k: int) -> int:
        # A token goes to min(K, R) ranks at most, and only once to each: so `tokens` rows always do.
        even: float = tokens * min(top_k, self._size) / self._size
        return max(1, min(tokens, math.ceil(self._factor * even)))

    def _fill(self, rows: Rows, place_TK: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """uint8 [rounds, R * capacity, bytes of a row], what is sent. Empty places have slots of -1."""
        tokens = len(rows.hidden_MH)
        void = Rows(
            hidden_MH=rows.hidden_MH.new_zeros(1, rows.hidden_MH.shape[1]),
            slots_MK=rows.slots_MK.new_full((1, rows.slots_MK.shape[1]), -1),
            weights_MK=rows.weights_MK.new_zeros(1, rows.weights_MK.shape[1]),
        )
        source = torch.cat([pack_rows(part, self._payload) for part in (rows, void)])
        places = plan.rounds * self._size * plan.capacity
        token_of_place = torch.full((places + 1,), tokens, device=source.device)
        tokens_T1 = torch.arange(tokens, device=source.device).unsqueeze(1)
        # Pairs that go nowhere have place -1: they are written to one more place, which is not sent.
        token_of_place[place_TK] = tokens_T1.expand_as(place_TK)
        return source[token_of_place[:-1]].view(plan.rounds, -1, source.shape[1])

    def _own_pairs(self, received: Rows, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([M, pairs] slots within this rank or -1, [M, pairs] weights) of each row's pairs here."""
        # The pairs here come first, in top-k order: `_Queue.pair_TK` counts on it.
        local_MK = received.slots_MK - self._first_slot
        here_MK = (local_MK >= 0) & (local_MK < self._slots_per_rank)
        order_MP = (~here_MK).to(torch.uint8).argsort(dim=1, stable=True)[:, :pairs]
        local_MK = local_MK.masked_fill(~here_MK, -1)
        return local_MK.gather(1, order_MP), received.weights_MK.gather(1, order_MP)

    def _return(self, rows: torch.Tensor, plan: _Plan) -> torch.Tensor:
        parts = rows.view(plan.rounds, -1, rows.shape[1]).unbind(0)
        return torch.cat([self._exchange(part) for part in parts])

    def _exchange(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        dist.all_to_all_single(out, rows, group=self._group)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Queue:
    """Where pairs go, and in which order.

    rank_TK: int64 [T, K]. The rank to which a pair goes; R if it goes nowhere.
    turn_TK: int64 [T, K]. How many earlier tokens go to that rank; -1 if the pair goes nowhere.
    pair_TK: int64 [T, K]. How many earlier pairs of its token go to that rank.
    """

    rank_TK: torch.Tensor
    turn_TK: torch.Tensor
    pair_TK: torch.Tensor

    def longest(self) -> torch.Tensor:
        """int64 scalar, the rows of the longest queue."""
        # Padded, since a maximum over no tokens at all is an error.
        padded = torch.nn.functional.pad(self.turn_TK.flatten(), (0, 1), value=-1)
        return padded.amax() + 1

    def tokens(self) -> torch.Tensor:
        """int64 scalar, the tokens that go anywhere."""
        return (self.turn_TK >= 0).any(1).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all ranks send in a step: `rounds` buffers of `capacity` rows to each."""

    capacity: int
    rounds: int

    def place(self, queue: _Queue, size: int) -> torch.Tensor:
        """int64 [T, K], the place in which a pair's token is sent, or -1.

        size: number of ranks.
        """
        # place = turn // capacity * (R * capacity) + rank * capacity + turn % capacity
        in_round = queue.rank_TK * self.capacity + queue.turn_TK % self.capacity
        place_TK = queue.turn_TK // self.capacity * (size * self.capacity) + in_round
        return place_TK.masked_fill(queue.turn_TK < 0, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handle:
    place_TK: torch.Tensor
    pair_TK: torch.Tensor
    plan: _Plan


def _is_captured(tensor: torch.Tensor) -> bool:
    """Whether operations on it become part of a CUDA graph."""
    return bool(tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _queue(slots_TK: torch.Tensor, slots_per_rank: int, size: int) -> _Queue:
    rank_TK = torch.div(slots_TK, slots_per_rank, rounding_mode="floor").long()
    nowhere_TK = slots_TK < 0
    rank_TK = rank_TK.masked_fill(nowhere_TK, size)  # a queue that is not sent
    goes_TR = torch.zeros(len(rank_TK), size + 1, dtype=torch.int64, device=slots_TK.device)
    goes_TR.scatter_(1, rank_TK, 1)
    turn_TK = (goes_TR.cumsum(0) - 1).gather(1, rank_TK).masked_fill(nowhere_TK, -1)
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    pair_TK = same_TKK.tril(-1).sum(2)
    return _Queue(rank_TK=rank_TK, turn_TK=turn_TK, pair_TK=pair_TK)
