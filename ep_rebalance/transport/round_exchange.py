"""One round of a migration: a single `all_to_all_single` of bytes between two engine steps.

Every rank derives the same splits from the same `Round`, so nothing is negotiated and nothing can
pair wrongly. A rank that fails to pack its experts still takes part with what is in its buffer; it
reports the fault in the vote that ends the batch, and the checksums would show it too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

import torch
import torch.distributed as dist

from ep_rebalance.migration import Batch, Round, Transfer
from ep_rebalance.transport.expert_memory import ExpertMemory
from ep_rebalance.transport.host_copy import HostCopy

logger = logging.getLogger(__name__)

CHECKSUM_BYTES = 16


class StagingFull(RuntimeError):
    """A round does not fit into the buffers that were reserved at start."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What ranks voted at the end of a batch: how many saw which fault."""

    transport: int
    checksum: int

    def __bool__(self) -> bool:
        return bool(self.transport or self.checksum)

    def __str__(self) -> str:
        return f"{self.transport} rank(s) with a transport error, {self.checksum} with a checksum error"


class RoundExchange:
    """Moves packed experts into this rank's staging memory, round by round.

    max_bytes: most expert bytes that a rank sends, and receives, in one round.
    staging_slots: experts that the staging memory holds.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        memory: ExpertMemory,
        max_bytes: int,
        staging_slots: int,
    ) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._memory = memory
        largest, smallest = max(memory.expert_bytes_L), min(memory.expert_bytes_L)
        transfers = max_bytes // smallest + 2 * self.size + 8
        capacity = max_bytes + transfers * 2 * CHECKSUM_BYTES
        self._send = torch.zeros(capacity, dtype=torch.uint8, device=memory.device)
        self._receive = torch.zeros_like(self._send)
        self.staging = torch.zeros(staging_slots, largest, dtype=torch.uint8, device=memory.device)
        self._expected = torch.zeros(staging_slots, dtype=torch.int64, device=memory.device)
        self._faults = torch.zeros(2, dtype=torch.int64, device=memory.device)
        self._transport_failed = False

    def begin_batch(self) -> None:
        """Forget the faults of the batch before."""
        self._transport_failed = False

    def exchange(self, batch: Batch, round_: Round) -> None:
        """Send and receive the round's byte ranges; they are in `staging` when the stream gets
        there.
        """
        send_R, receive_R = self._splits(batch, round_)
        try:
            self._pack(batch, round_)
        except Exception:
            logger.exception("ep_rebalance rank %d: experts were not packed", self.rank)
            self._transport_failed = True
        try:
            dist.all_to_all_single(
                self._receive[: sum(receive_R)],
                self._send[: sum(send_R)],
                receive_R,
                send_R,
                group=self._group,
            )
            self._unpack(batch, round_)
        except Exception:
            logger.exception("ep_rebalance rank %d: a round was not exchanged", self.rank)
            self._transport_failed = True

    def vote(self, batch: Batch) -> HostCopy:
        """Check every expert that arrived and add up all ranks' faults; read them with `faults_of`."""
        self._faults.zero_()
        try:
            for move in batch.moves:
                if move.dst_rank == self.rank:
                    packed = self.staging[move.staging]
                    arrived = self._memory.checksum_packed(move.layer, packed)
                    self._faults[1] += (arrived[0] != self._expected[move.staging]).long()
        except Exception:
            logger.exception("ep_rebalance rank %d: arrived experts were not checked", self.rank)
            self._transport_failed = True
        self._faults[0] = int(self._transport_failed)
        self._faults[1].clamp_(max=1)
        dist.all_reduce(self._faults, group=self._group)
        return HostCopy(self._faults)

    @staticmethod
    def faults_of(vote: HostCopy) -> Faults:
        """The same on every rank."""
        transport, checksum = vote.result().tolist()
        return Faults(transport, checksum)

    def _wire_bytes(self, batch: Batch, transfer: Transfer) -> int:
        """Bytes of a transfer on the wire: padded, and with the expert's checksum behind its last
        range.
        """
        length = -(-(transfer.stop - transfer.start) // CHECKSUM_BYTES) * CHECKSUM_BYTES
        return length + (CHECKSUM_BYTES if self._is_last(batch, transfer) else 0)

    def _is_last(self, batch: Batch, transfer: Transfer) -> bool:
        layer = batch.moves[transfer.move].layer
        return transfer.stop == self._memory.expert_bytes_L[layer]

    def _splits(self, batch: Batch, round_: Round) -> tuple[list[int], list[int]]:
        """Bytes to and from each peer. Adds up all ranks, so that StagingFull is raised on all or
        on none.
        """
        to_peer_R, from_peer_R = [0] * self.size, [0] * self.size
        sent_R, received_R = [0] * self.size, [0] * self.size
        for transfer in round_.transfers:
            move, size = batch.moves[transfer.move], self._wire_bytes(batch, transfer)
            sent_R[move.src_rank] += size
            received_R[move.dst_rank] += size
            if move.src_rank == self.rank:
                to_peer_R[move.dst_rank] += size
            if move.dst_rank == self.rank:
                from_peer_R[move.src_rank] += size
        busiest = max(*sent_R, *received_R)
        if busiest > self._send.numel():
            raise StagingFull(
                f"a round of {busiest} bytes on one rank does not fit into {self._send.numel()}"
            )
        return to_peer_R, from_peer_R

    def _pack(self, batch: Batch, round_: Round) -> None:
        for transfer, region in self._regions(batch, round_, self._send, sending=True):
            move = batch.moves[transfer.move]
            slot = move.src_slot % self._memory.slots
            length = transfer.stop - transfer.start
            ends = self._is_last(batch, transfer)
            checksum = region[-CHECKSUM_BYTES:].view(torch.int64)[:1] if ends else None
            self._memory.read(move.layer, slot, transfer.start, region[:length], checksum)

    def _unpack(self, batch: Batch, round_: Round) -> None:
        for transfer, region in self._regions(batch, round_, self._receive, sending=False):
            staging = batch.moves[transfer.move].staging
            length = transfer.stop - transfer.start
            self.staging[staging, transfer.start : transfer.stop].copy_(region[:length])
            if self._is_last(batch, transfer):
                self._expected[staging] = region[-CHECKSUM_BYTES:].view(torch.int64)[0]

    def _regions(
        self, batch: Batch, round_: Round, buffer: torch.Tensor, *, sending: bool
    ) -> Iterator[tuple[Transfer, torch.Tensor]]:
        """This rank's transfers by peer, then in round order: the layout that both ends agree on."""
        by_peer = []
        for transfer in round_.transfers:
            move = batch.moves[transfer.move]
            ends = (move.src_rank, move.dst_rank)
            here, peer = ends if sending else reversed(ends)
            if here == self.rank:
                by_peer.append((peer, transfer))
        position = 0
        for _, transfer in sorted(by_peer, key=itemgetter(0)):
            size = self._wire_bytes(batch, transfer)
            yield transfer, buffer[position : position + size]
            position += size
