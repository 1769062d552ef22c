"""One round of a migration: a single `all_to_all_single` of bytes between two engine steps.

Every rank knows the splits of every round before the first one begins, so nothing is negotiated and
nothing can pair wrongly. A rank that fails in its own work still takes part in every collective, with
whatever is in its buffer. It reports the fault in the vote that ends the batch, and the checksums
would reveal it too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_rebalance.host_memory import Download
from ep_rebalance.migration import Batch, Itinerary
from ep_rebalance.migration.audit import SlotAudit
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.itinerary import CHECKSUM_BYTES, Leg

logger = logging.getLogger(__name__)

STANDSTILL_BYTES_PER_ROUND = 32 << 20
"""More than a step carries by default: of what is moved while all ranks wait for it."""


class StagingFull(RuntimeError):
    """A batch does not fit into the buffers that were reserved at the start."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What the ranks voted at the end of a batch: how many of them saw each fault.

    transport: ranks on which a round failed.
    checksum: ranks on which an expert arrived damaged.
    replaced: ranks whose weights the engine replaced in the meantime.
    """

    transport: int
    checksum: int
    replaced: int = 0

    def __bool__(self) -> bool:
        return bool(self.transport or self.checksum or self.replaced)

    def __str__(self) -> str:
        if self.replaced:
            return f"the engine replaced the weights of {self.replaced} rank(s)"
        return f"{self.transport} rank(s) with a transport error, {self.checksum} with a checksum error"


class RoundExchange:
    """Moves packed experts into this rank's staging memory, round by round.

    max_bytes: bytes of experts. The most that a rank sends, and receives, in one round.
    staging_slots: how many experts the staging memory holds.
    audit: knows what the checksums of this rank's slots must be; None if nobody does.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        memory: ExpertMemory,
        max_bytes: int,
        staging_slots: int,
        audit: SlotAudit | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self._audit = audit
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._memory = memory
        largest, smallest = max(memory.expert_bytes_L), min(memory.expert_bytes_L)
        # Whole experts, and parts of all that are on their way. On the wire each range is padded by less
        # than CHECKSUM_BYTES and may be followed by a checksum.
        transfers = max_bytes // smallest + self.size * staging_slots + 8
        capacity = max_bytes + transfers * 2 * CHECKSUM_BYTES
        self._send = torch.zeros(capacity, dtype=torch.uint8, device=memory.device)
        self._receive = torch.zeros_like(self._send)
        self.staging = torch.zeros(staging_slots, largest, dtype=torch.uint8, device=memory.device)
        self._expected = torch.zeros(staging_slots, dtype=torch.int64, device=memory.device)
        self._arrived = torch.zeros_like(self._expected)
        self._differs = torch.zeros(staging_slots, dtype=torch.bool, device=memory.device)
        self._damaged = torch.zeros(1, dtype=torch.bool, device=memory.device)
        self._sent_damaged = torch.zeros_like(self._damaged)
        self._faults = torch.zeros(3, dtype=torch.int64, device=memory.device)
        self._votes = Download(self._faults)
        self._transport_failed = False

    @property
    def reserved_bytes(self) -> int:
        """Bytes on the device for staging, and for what a round sends and receives."""
        buffers = (self.staging, self._send, self._receive)
        return sum(int(buffer.nbytes) for buffer in buffers)

    def warm_up(self) -> None:
        """Connect to every peer, and compile and load every kernel of a migration.

        To be called before serving, on all ranks in the same order. Weights and staging memory stay
        as they are.
        """
        self._memory.warm_up(self.staging[0])
        self._send.zero_()
        peers = [CHECKSUM_BYTES] * self.size
        everything = CHECKSUM_BYTES * self.size
        self._all_to_all(everything, everything, peers, peers)
        self._expected.zero_()
        self._expected[:1].copy_(self._receive[:8].view(torch.int64))
        self._arrived.zero_()
        self._compare()
        self._add_up_faults(replaced=False)
        self._votes.start(self._faults)
        self._votes.result()

    def begin_batch(self, batch: Batch) -> None:
        """Forget the faults of the previous batch. Raises StagingFull on all ranks or on none."""
        busiest = _itinerary(batch).busiest_bytes
        if busiest > self._send.numel():
            raise StagingFull(
                f"a round of {busiest} bytes on one rank does not fit into {self._send.numel()}"
            )
        self._transport_failed = False
        self._sent_damaged.zero_()

    def replace_memory(self, memory: ExpertMemory) -> None:
        """Use other tensors as this rank's experts. Raises ValueError if an expert's size differs."""
        if memory.expert_bytes_L != self._memory.expert_bytes_L:
            raise ValueError(
                f"experts of {memory.expert_bytes_L} bytes do not fit in the place of "
                f"{self._memory.expert_bytes_L}"
            )
        self._memory = memory

    def exchange(self, batch: Batch, number: int) -> None:
        """Send and receive the byte ranges of round `number`.

        They are in `staging` once the stream has reached this point. If the all-to-all raises twice,
        so does this: the rank is then out of step.
        """
        part = _itinerary(batch)
        self._attempt("experts were not packed", self._pack, part, number)
        send_R, receive_R = part.sends.splits(number), part.receives.splits(number)
        self._take_part(self._all_to_all, sum(receive_R), sum(send_R), receive_R, send_R)
        self._attempt("experts were not unpacked", self._unpack, part, number)

    def deliver(self, batch: Batch, *, replaced: bool = False) -> Faults:
        """All rounds of a batch that was begun, and what the ranks voted. Waits for the device."""
        for number in range(len(batch.rounds)):
            self.exchange(batch, number)
        return self.faults_of(self.vote(batch, replaced=replaced))

    @property
    def failed_here(self) -> bool:
        """Whether this rank failed in the batch; the vote tells only how many did."""
        return self._transport_failed

    def vote(
        self,
        batch: Batch,
        *,
        replaced: bool = False,
        known: Mapping[int, torch.Tensor] | None = None,
    ) -> Download:
        """Check every expert that arrived, and sum all ranks' faults; `faults_of` reads them.

        replaced: whether the engine replaced this rank's weights, which voids what it sent.
        known: int64 [1] by place in the staging memory, checksums that arrivals must have whatever their
            senders say.

        If the all-reduce raises twice, so does this: the rank is then out of step.
        """
        self._attempt("arrived experts were not checked", self._check, batch, known or {})
        self._take_part(self._add_up_faults, replaced)
        self._votes.start(self._faults)
        return self._votes

    def checksum_of(self, place: int) -> torch.Tensor:
        """int64 [1], that of what arrived at a place of the staging memory, once a vote was passed."""
        return self._arrived[place : place + 1]

    @staticmethod
    def faults_of(vote: Download) -> Faults:
        """What all ranks voted; the same on every rank."""
        return Faults(*vote.result().tolist())

    def _attempt(self, failure: str, work: Callable[..., None], *arguments: Any) -> None:
        """Do what this rank can fail at alone; if it does, the vote tells the others."""
        try:
            work(*arguments)
        except Exception:
            logger.exception("ep_rebalance rank %d: %s", self.rank, failure)
            self._transport_failed = True

    def _take_part(self, collective: Callable[..., None], *arguments: Any) -> None:
        """Issue a collective in which the others wait.

        One that raised was not issued. It is issued again, because otherwise this rank's next
        collective would pair with the one that the others are waiting in.
        """
        try:
            collective(*arguments)
        except Exception:
            logger.exception("ep_rebalance rank %d: a collective was not issued", self.rank)
            self._transport_failed = True
            collective(*arguments)

    def _all_to_all(
        self, received: int, sent: int, receive_R: list[int], send_R: list[int]
    ) -> None:
        dist.all_to_all_single(
            self._receive[:received], self._send[:sent], receive_R, send_R, group=self._group
        )

    def _add_up_faults(self, replaced: bool) -> None:
        self._faults[:1].fill_(int(self._transport_failed))
        self._faults[1:2].copy_(self._damaged.logical_or_(self._sent_damaged))
        self._faults[2:].fill_(int(replaced))
        dist.all_reduce(self._faults, group=self._group)

    def _pack(self, part: Itinerary, number: int) -> None:
        for leg in part.sends.of_round(number):
            out = self._send[leg.offset : leg.offset + leg.stop - leg.start]
            checksum = None if leg.checksum < 0 else _checksum(self._send, leg.checksum)
            self._memory.read(leg.layer, leg.place, leg.start, out, checksum)
            if checksum is not None and self._audit is not None:
                self._hold_to(leg, checksum, self._audit)

    def _hold_to(self, leg: Leg, checksum: torch.Tensor, audit: SlotAudit) -> None:
        """A slot that is corrupted must not be moved on as if it were whole."""
        expected = audit.expected(leg.layer, self.rank * self._memory.slots + leg.place)
        if expected is not None:
            self._sent_damaged.logical_or_(checksum.ne(expected))

    def _unpack(self, part: Itinerary, number: int) -> None:
        for leg in part.receives.of_round(number):
            arrived = self._receive[leg.offset : leg.offset + leg.stop - leg.start]
            self.staging[leg.place, leg.start : leg.stop].copy_(arrived)
            if leg.checksum >= 0:
                expected = _checksum(self._receive, leg.checksum)
                self._expected[leg.place : leg.place + 1].copy_(expected)

    def _check(self, batch: Batch, known: Mapping[int, torch.Tensor]) -> None:
        """Find out whether the checksum of any expert that arrived differs from its sender's."""
        for place, checksum in known.items():
            self._expected[place : place + 1].copy_(checksum)
        # Places where nothing arrived are equal, and so count as whole.
        self._damaged.zero_()
        self._arrived.copy_(self._expected)
        for move in batch.arrivals(self.rank):
            checksum = self._arrived[move.staging : move.staging + 1]
            self._memory.checksum_packed(move.layer, self.staging[move.staging], checksum)
        self._compare()

    def _compare(self) -> None:
        torch.ne(self._arrived, self._expected, out=self._differs)
        torch.any(self._differs, dim=0, keepdim=True, out=self._damaged)


def _itinerary(batch: Batch) -> Itinerary:
    assert batch.itinerary is not None, "the migration was worked out for no rank"
    return batch.itinerary


def _checksum(wire: torch.Tensor, position: int) -> torch.Tensor:
    """int64 [1], a view of the wire at byte `position`."""
    return wire[position : position + 8].view(torch.int64)


def standstill_exchange(
    *,
    group: dist.ProcessGroup,
    memory: ExpertMemory,
    staging_slots: int,
    audit: SlotAudit | None = None,
) -> RoundExchange | None:
    """For moves that all ranks wait for. None where this rank lacks the memory, which is logged: the caller
    has to take part in agreeing on that.
    """
    try:
        return RoundExchange(
            group=group,
            memory=memory,
            max_bytes=STANDSTILL_BYTES_PER_ROUND,
            staging_slots=staging_slots,
            audit=audit,
        )
    except RuntimeError:  # torch's out of memory is one
        logger.exception("ep_rebalance: not enough memory for experts on their way")
        return None
