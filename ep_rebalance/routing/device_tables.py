"""Counters and dispatch tables on the device: what the forward pass reads and writes.

All memory is reserved once; after that it is only written in place. Nothing on the step path waits
for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.host_memory import UploadRing, pinned
from ep_rebalance.kernels.route_and_count import LayerTables, count_experts, histogram_pairs
from ep_rebalance.kernels.route_by_own_counts import PourTables
from ep_rebalance.kernels.shared_arithmetic import IGNORED, Ranks
from ep_rebalance.placement import Placement
from ep_rebalance.routing.pours import ground_of_ranks, pour_order
from ep_rebalance.routing.route import route
from ep_rebalance.routing.thresholds import HASH_RANGE, HASH_STRIDE, dispatch_thresholds
from ep_rebalance.topology import Topology

logger = logging.getLogger(__name__)

_OFFSET_BYTES = 8
_NOT_POURED = -1
"""In all of a layer's `pours_LO`: its experts are split by their quotas."""
_TABLES_AT_A_TIME = 3
"""Those of a migration, those of a split, and those of a split that is being worked out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchTables:
    """How one rank dispatches all layers of a placement; on the host, ready to be uploaded.

    slots_LEC, thresholds_LEC: int32 [L, E, C]. See `dispatch_thresholds`.
    pours_LO: int32 [L, 2 X + E]. `PourTables` one after another, but for the ground.
    ground_LR: int32 [L, R]. Both are None where tokens are split by quotas.
    """

    slots_LEC: torch.Tensor
    thresholds_LEC: torch.Tensor
    pours_LO: torch.Tensor | None = None
    ground_LR: torch.Tensor | None = None


class RoutingTables:
    """Counters and dispatch tables of all layers, and the phase of each token in the current step.

    topology, rank: where the tokens are that it routes.
    counts_here: whether this rank counts its tokens; see `mark_tokens`.
    by_own_counts: whether each step's own tokens are spread evenly, and not by quotas.

    counts_LAE: int64 [L, 3, E], tokens. By phase, with a third row for tokens that do not count.
    earlier_LAE: int64 [L, 2, E], tokens. Of these, what `book_earlier` set apart.
    phase_T: int8 [max_tokens]. IGNORED except for the tokens that a real step marks.
    offset: int64 [1]. The offset of the tokens' hash.
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
        by_own_counts: bool = False,
    ) -> None:
        layers, experts = placement.num_layers, placement.num_experts
        self.counts_LAE = torch.zeros(layers, 3, experts, dtype=torch.int64, device=device)
        self.earlier_LAE = torch.zeros(layers, 2, experts, dtype=torch.int64, device=device)
        # No expert has a slot until tables are served: what is routed before goes nowhere.
        shape = layers, experts, placement.max_replicas
        self._slots_LEC = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._thresholds_LEC = torch.full_like(self._slots_LEC, HASH_RANGE)
        # An expert is poured once, however many of the redundant slots it has.
        self._rows = min(placement.num_redundant, experts) if by_own_counts else 0
        width = 2 * self._rows + experts
        self._pours_LO = torch.full((layers, width), _NOT_POURED, dtype=torch.int32, device=device)
        self._ground_LR = torch.zeros(layers, placement.num_ranks, dtype=torch.int32, device=device)
        self.ranks = Ranks(
            total=placement.num_ranks,
            slots=placement.slots_per_rank if self._rows else 0,
            source=topology.source_of_rank[rank],
        )
        self.pours = tuple(
            _pour_tables(pours_O, self._rows, ground_R)
            for pours_O, ground_R in zip(self._pours_LO, self._ground_LR, strict=True)
        )
        self.layers = tuple(
            LayerTables(
                counts_AE=self.counts_LAE[layer],
                replica_slots_EC=self._slots_LEC[layer],
                thresholds_EC=self._thresholds_LEC[layer],
            )
            for layer in range(layers)
        )
        # The offset with the phases behind it, so that a step uploads once.
        size = _OFFSET_BYTES + max_tokens
        self._step = torch.full((size,), IGNORED, dtype=torch.int8, device=device)
        self._uploads = UploadRing((size,), torch.int8, device)
        self.offset = self._step[:_OFFSET_BYTES].view(torch.int64)
        self.offset.zero_()
        self.phase_T = self._step[_OFFSET_BYTES:]
        self._max_tokens = max_tokens
        self._steps, self._marked = 0, 0
        self.counts_here = counts_here
        self._told_of_overflow = False
        self._topology, self._rank = topology, rank

    def mark_tokens(self, phases_T: NDArray[np.integer]) -> None:
        """Set the phases of the coming step's tokens; all others stay IGNORED.

        phases_T: [T]. PREFILL, DECODE or IGNORED for each token.

        Every token must be counted on exactly one rank. Where ranks route the same tokens (tensor
        parallelism without sequence parallelism), only one of them is built with `counts_here`.
        Tokens beyond `max_tokens` are routed but not counted, which is logged once.
        """
        counted_T = self._countable(phases_T)
        before, self._marked = self._marked, len(counted_T)
        length = _OFFSET_BYTES + max(before, self._marked)
        # Only as much is uploaded as this step marks, or the one before left marked.
        step = self._uploads.next().numpy()
        step[:_OFFSET_BYTES].view(np.int64)[0] = self._steps * HASH_STRIDE % HASH_RANGE
        step[_OFFSET_BYTES : _OFFSET_BYTES + self._marked] = counted_T
        step[_OFFSET_BYTES + self._marked : length] = IGNORED
        self._uploads.upload(self._step[:length], length)

    def end_step(self) -> None:
        """Forget the step's tokens, so that dummy and warm-up steps count nothing."""
        if self._marked:
            self.phase_T[: self._marked].fill_(IGNORED)
        self._marked = 0
        self._steps += 1

    def route(
        self,
        layer: int,
        topk_ids_TK: torch.Tensor,
        first_token: int,
        end_token: int | None = None,
    ) -> torch.Tensor:
        """[T, K], the slot for each of one layer's top-k ids, which are also counted.

        topk_ids_TK: [T, K]. Logical experts; see `route`.
        first_token: where these rows start in the batch that `mark_tokens` described.
        end_token: where rows end that are tokens of that batch; None if all of its rest may be.
        """
        phase_T = self._phases(len(topk_ids_TK), first_token, end_token)
        tables, pours = self.layers[layer], self.pours[layer]
        return route(topk_ids_TK, phase_T, tables, pours, self.offset, self.ranks)

    def count(
        self,
        layer: int,
        topk_ids_TK: torch.Tensor,
        first_token: int,
        end_token: int | None = None,
    ) -> None:
        """Count the ids without routing them; arguments as in `route`."""
        phase_T = self._phases(len(topk_ids_TK), first_token, end_token)
        count_experts(topk_ids_TK, phase_T, self.layers[layer].counts_AE)

    def warm_up(self) -> None:
        """Compile whatever a step may run, and reserve what is uploaded from. It takes seconds.

        To be called before serving, on a stream that counts nothing else. Counts and phases stay as
        they are.
        """
        for dtype in (torch.int32, torch.int64):
            for pairs in (1, histogram_pairs(self.layers[0].counts_AE.shape[1])):
                padding = torch.full((pairs, 1), -1, dtype=dtype, device=self.phase_T.device)
                self.route(0, padding, 0)
                self.count(0, padding, 0)
        uploaded = [self._slots_LEC, self._thresholds_LEC]
        if self._rows:
            uploaded += [self._pours_LO, self._ground_LR]
        _ = [
            pinned(np.zeros(table.shape, dtype=np.int32), table.device)
            for table in uploaded
            for _ in range(_TABLES_AT_A_TIME)
        ]

    def dispatch_tables(
        self,
        placement: Placement,
        quotas_LP: NDArray[np.float64],
        load_LE: NDArray[np.float64] | None = None,
    ) -> DispatchTables:
        """The tables that `serve` and `split` take.

        quotas_LP: float64 [L, P]. As in `dispatch_thresholds`.
        load_LE: float64 [L, E], tokens. What the quotas were fitted to; without it, tokens that are split by
            own counts do not stay near.

        It takes milliseconds, and any thread may call it.
        """
        tables = dispatch_thresholds(
            placement,
            range(placement.num_layers),
            quotas_LP,
            topology=self._topology,
            rank=self._rank,
        )
        device = self._slots_LEC.device
        slots_LEC, thresholds_LEC = (pinned(table, device) for table in tables)
        pours_LO = ground_LR = None
        if self._rows:
            order = pour_order(
                tables[0],
                rows=self._rows,
                slots_per_rank=placement.slots_per_rank,
                num_ranks=placement.num_ranks,
            )
            pours_LO = pinned(np.concatenate(order, axis=1), device)
            ground = ground_of_ranks(*tables, quotas_LP, load_LE, placement.num_ranks)
            ground_LR = pinned(ground, device)
        return DispatchTables(
            slots_LEC=slots_LEC,
            thresholds_LEC=thresholds_LEC,
            pours_LO=pours_LO,
            ground_LR=ground_LR,
        )

    def book_earlier(self, layers: Sequence[int]) -> None:
        """Set apart what was counted in these layers so far, in stream order: other slots compute what comes
        next. layers: ascending.
        """
        for first, stop in _runs(layers):
            counts_XAE = self.counts_LAE[first:stop]
            self.earlier_LAE[first:stop] += counts_XAE[:, : self.earlier_LAE.shape[1]]
            counts_XAE.zero_()

    def serve(self, layers: Sequence[int], tables: DispatchTables) -> None:
        """Swap the tables of `layers`, in place and in stream order."""
        for layer in layers:
            self._slots_LEC[layer].copy_(tables.slots_LEC[layer], non_blocking=True)
            self._thresholds_LEC[layer].copy_(tables.thresholds_LEC[layer], non_blocking=True)
            if tables.pours_LO is not None:
                self._pours_LO[layer].copy_(tables.pours_LO[layer], non_blocking=True)
            if tables.ground_LR is not None:
                self._ground_LR[layer].copy_(tables.ground_LR[layer], non_blocking=True)

    def split(self, tables: DispatchTables) -> None:
        """Split tokens anew over the replicas that are served, in place and in stream order."""
        self._thresholds_LEC.copy_(tables.thresholds_LEC, non_blocking=True)
        if tables.ground_LR is not None:
            self._ground_LR.copy_(tables.ground_LR, non_blocking=True)

    def set_dispatch(
        self,
        layers: Sequence[int],
        placement: Placement,
        quotas_LP: NDArray[np.float64],
        *,
        strictly: bool = False,
    ) -> None:
        """Work out the tables and serve them; too slow for the step path.

        strictly: whether a slot whose quota is 0 gets no token, also where tokens are split by their own
            counts.
        """
        self.serve(layers, self.dispatch_tables(placement, quotas_LP))
        if strictly:
            for layer in layers:
                self._pours_LO[layer].fill_(_NOT_POURED)

    def _phases(self, rows: int, first: int, end: int | None) -> torch.Tensor:
        """Of these rows, as far as they are tokens."""
        stop = first + rows if end is None else min(first + rows, end)
        return self.phase_T[first : max(stop, first)]

    def _countable(self, phases_T: NDArray[np.integer]) -> NDArray[np.integer]:
        if not self.counts_here:
            return phases_T[:0]
        if len(phases_T) > self._max_tokens and not self._told_of_overflow:
            self._told_of_overflow = True
            logger.warning(
                "ep_rebalance: a step has %d tokens; only its first %d are counted",
                len(phases_T),
                self._max_tokens,
            )
        return phases_T[: self._max_tokens]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, stop) of what follows one another. numbers: ascending."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def _pour_tables(pours_O: torch.Tensor, rows: int, ground_R: torch.Tensor) -> PourTables:
    """Views of one layer's tables."""
    return PourTables(
        poured_X=pours_O[:rows],
        colour_X=pours_O[rows : 2 * rows],
        row_E=pours_O[2 * rows :],
        ground_R=ground_R,
    )
