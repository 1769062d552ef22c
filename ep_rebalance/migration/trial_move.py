"""Whether an expert computes the same on another rank: one real move of each rank, in one layer.

What a rank can try alone (`proof.py`) says nothing of what experts share on it, such as a scale of its
own. So each rank sends the expert in its first slot to the next one, round the ring, by the exchange that
serves migrations, and the receiver has to compute the outputs that the sender had, for the same tokens.

A rank that fails at something of its own takes part in every collective that follows, and says so in
the next one. Then all ranks stop together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ep_rebalance.migration.batches import Batch
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import (
    Compute,
    Verdict,
    allowed_difference,
    differences_T,
    failed,
    largest_difference,
    repeated,
    verdict_of,
)
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.migration.schedule import schedule
from ep_rebalance.migration.slabs import SlabTensor
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.topology import Topology

T = TypeVar("T")

_VERDICTS = tuple(Verdict)
_SLOT = 0
"""Local slot from which and into which experts go."""
_PIECE = 4 << 20
"""Bytes that are on their way at once, and that are compared at once: what either takes besides experts."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came of the expert that a rank received from the one before it.

    noise, moved, missed, restored: as of `Proof`; 0 if it did not come to that.
    """

    verdict: Verdict
    noise: float = 0.0
    moved: float = 0.0
    missed: float = 0.0
    restored: float = 0.0


@dataclass(frozen=True, slots=True)
class RingProof:
    """arrivals_R: by rank, the same on all of them. failure: this rank's error, in a line, if it had one.
    swapped: pairs of slabs, by name. What arrived misplaced on this rank computes the right outputs with the
        two exchanged: they go by each other's name on one of the ranks.
    """

    arrivals_R: tuple[Arrival, ...]
    failure: str = ""
    swapped: tuple[tuple[str, str], ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Of all ranks: the first that allows no moves, and of those one that says why."""
        verdicts = [arrival.verdict for arrival in self.arrivals_R]
        refusals = [verdict for verdict in verdicts if not verdict.allows_moves]
        reasons = [verdict for verdict in refusals if verdict is not Verdict.UNTRIED]
        told = [v for v in (Verdict.WITHIN_NOISE, Verdict.EXACT) if v in verdicts]
        return next(iter([*reasons, *refusals, *told, *verdicts]))

    @property
    def refusing_ranks(self) -> tuple[int, ...]:
        """Those that could not show that moves are safe, without those that others kept from trying."""
        return tuple(
            rank
            for rank, arrival in enumerate(self.arrivals_R)
            if not arrival.verdict.allows_moves and arrival.verdict is not Verdict.UNTRIED
        )


def prove_move(
    memory: ExpertMemory,
    layer: int,
    compute: Compute,
    ids_TK: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    host_group: dist.ProcessGroup | None = None,
) -> RingProof:
    """Try it, once for each kind of layer. Collective; slots hold the same bytes afterwards.

    memory: of this rank. Experts of the layer must be as large on all ranks, or the verdict is FAILED.
    compute: all ranks have the same tokens. It is called as often on each rank as long as all can go on:
        it may be collective. A rank where it raised waits for the others in a collective of `host_group`;
        they wait in one of `compute`, if it has any, until the timeout of its group.
    ids_TK: int32 [T, K], on the device. Only its shape counts: all tokens go to the expert that moves.
    group: carries what lies on the device of `memory`.
    host_group: the same ranks, for what they tell each other; None for `group`, unless `compute` has
        collectives of that one.

    Takes memory for two experts and a few pieces, which it gives back. Raises only if a collective of
    these groups does: the rank is then out of step.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return RingProof((Arrival(Verdict.ALONE),))
    ids_TK = torch.full_like(ids_TK, _SLOT)
    proof = _Trial(memory, layer, compute, ids_TK, group, host_group).run()
    if memory.device.type == "cuda":
        torch.cuda.empty_cache()
    return proof


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """kept: bytes of the expert in our slot, by slab. checksums_S: int64 [S], of all of our experts."""

    exchange: RoundExchange
    batch: Batch
    kept: tuple[torch.Tensor, ...]
    checksums_S: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Before:
    """outputs_TH, noise: of our expert before it left. theirs_TH: of the sender's there."""

    outputs_TH: torch.Tensor
    theirs_TH: torch.Tensor
    noise: float


class _Trial:
    """One rank's part. ids_TK: of our slot."""

    def __init__(
        self,
        memory: ExpertMemory,
        layer: int,
        compute: Compute,
        ids_TK: torch.Tensor,
        group: dist.ProcessGroup,
        host_group: dist.ProcessGroup | None,
    ) -> None:
        self._memory = memory
        self._layer = layer
        self._slabs = memory.slabs_L[layer]
        self._same_size = [(a, b) for a, b in combinations(self._slabs, 2) if a.size == b.size]
        self._compute = compute
        self._ids_TK = ids_TK
        self._group = group
        self._telling = host_group or group
        self._telling_on = memory.device if host_group is None else torch.device("cpu")
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._failure = ""

    def run(self) -> RingProof:
        prepared = self._attempt(self._prepare)
        size = self._memory.expert_bytes_L[self._layer]
        sizes = self._memory.slots, size, len(self._same_size), *self._ids_TK.shape
        told_R = self._tell_alike("its experts or its tokens are others", sizes)
        if prepared is None or _any_failed(told_R):
            return self._stopped(told_R, Verdict.UNTRIED)

        ours = self._attempt(lambda: repeated(self._compute, self._ids_TK))
        outputs_TH, noise = ours or (torch.empty(0), 0.0)
        told_R = self._tell_alike("its outputs have another size", (outputs_TH.nbytes,))
        if ours is None or _any_failed(told_R):
            return self._stopped(told_R, Verdict.UNTRIED)
        noise = max(self._tell(noise)[:, 1].tolist())
        before = _Before(outputs_TH, self._of_sender(outputs_TH), noise)

        delivered = self._deliver(prepared)
        told_R = self._tell()
        if not delivered:
            return self._stopped(told_R, Verdict.UNDELIVERED)
        return self._compare(prepared, before)

    def _compare(self, prepared: _Prepared, before: _Before) -> RingProof:
        moved_TH = self._moved(prepared)
        whole = self._attempt(lambda: self._holds(prepared))
        restored_TH = self._attempt(lambda: self._compute(self._ids_TK))
        replica = self._attempt(lambda: self._had_it(prepared))
        arrival = self._attempt(lambda: _arrival(before, moved_TH, restored_TH, bool(replica)))
        if arrival is None:
            arrival = Arrival(Verdict.FAILED)
        verdict = Verdict.NOT_RESTORED if whole is False else arrival.verdict
        told_R = self._tell(
            _VERDICTS.index(verdict),
            arrival.noise,
            arrival.moved,
            arrival.missed,
            arrival.restored,
        )
        arrivals_R = tuple(_told_arrival(told) for told in told_R.tolist())
        swapped = () if _any_failed(told_R) else self._swapped(prepared, before, arrivals_R)
        return RingProof(arrivals_R, self._failure, swapped)

    def _moved(self, prepared: _Prepared, *exchanged: SlabTensor) -> torch.Tensor | None:
        """Outputs of what arrived, in our slot for that long. exchanged: as of `_write`."""
        try:
            self._attempt(lambda: self._write(prepared, *exchanged))
            return self._attempt(lambda: self._compute(self._ids_TK))
        finally:
            self._attempt(lambda: self._put_back(prepared))

    def _swapped(
        self, prepared: _Prepared, before: _Before, arrivals_R: Sequence[Arrival]
    ) -> tuple[tuple[str, str], ...]:
        """As of `RingProof`. What all were told decides, so that all compute equally often."""
        misplaced_R = [arrival.verdict is Verdict.MISPLACED for arrival in arrivals_R]
        if not any(misplaced_R):
            return ()
        swapped = [
            (one.name, other.name)
            for one, other in self._same_size
            if self._is_right(self._moved(prepared, one, other), before)
        ]
        return tuple(swapped) if misplaced_R[self._rank] else ()

    def _is_right(self, outputs_TH: torch.Tensor | None, before: _Before) -> bool:
        """Whether these are what the sender had. outputs_TH: None for what could not be computed."""
        if outputs_TH is None:
            return False
        far = self._attempt(lambda: largest_difference(before.theirs_TH, outputs_TH))
        return far is not None and far <= allowed_difference(before.noise)

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Do what this rank can fail at alone; None if it does, and the others are told next."""
        try:
            return work()
        except Exception as error:
            self._failure = self._failure or failed(error).failure
            return None

    def _tell(self, *numbers: float) -> torch.Tensor:
        """float64 [R, 1 + n]: of each rank whether it failed, then its numbers."""
        own = torch.tensor(
            [float(bool(self._failure)), *numbers], dtype=torch.float64, device=self._telling_on
        )
        told_R = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(told_R, own, group=self._telling)
        return torch.stack(told_R).cpu()

    def _tell_alike(self, otherwise: str, numbers: Sequence[int]) -> torch.Tensor:
        """As `_tell`; ranks whose numbers are not those of the first one that has not failed have failed.

        As many numbers on all ranks.
        """
        told_R = self._tell(*numbers)
        well = torch.nonzero(told_R[:, 0] == 0).flatten()
        if len(well):
            others = (told_R != told_R[well[0]]).any(1)
            told_R[:, 0] = others.double()
            if others[self._rank] and not self._failure:
                self._failure = f"{otherwise} than those of EP rank {int(well[0])}"
        return told_R

    def _stopped(self, told_R: torch.Tensor, others: Verdict) -> RingProof:
        """others: what those say that have not failed."""
        verdicts = [
            Verdict.FAILED if has_failed else others for has_failed in told_R[:, 0].tolist()
        ]
        return RingProof(tuple(map(Arrival, verdicts)), self._failure)

    def _prepare(self) -> _Prepared:
        exchange = RoundExchange(
            group=self._group, memory=self._memory, max_bytes=_PIECE, staging_slots=1
        )
        batch = _round_the_ring(self._memory, self._layer, self._rank, self._size)
        exchange.begin_batch(batch)
        kept = tuple(slab.bytes_EB[_SLOT].clone() for slab in self._slabs)
        return _Prepared(exchange, batch, kept, self._checksums_S())

    def _checksums_S(self) -> torch.Tensor:
        device = self._memory.device
        checksums_S = torch.zeros(self._memory.slots, dtype=torch.int64, device=device)
        some = torch.empty(16, dtype=torch.uint8, device=device)
        for slot in range(self._memory.slots):
            self._memory.read(self._layer, slot, 0, some, checksums_S[slot : slot + 1])
        return checksums_S

    def _of_sender(self, outputs_TH: torch.Tensor) -> torch.Tensor:
        """What the rank before ours passes here, of the same form."""
        sent = outputs_TH.contiguous().view(-1).view(torch.uint8)
        received = torch.empty_like(sent)
        to_R, from_R = [0] * self._size, [0] * self._size
        to_R[(self._rank + 1) % self._size] = sent.numel()
        from_R[(self._rank - 1) % self._size] = sent.numel()
        dist.all_to_all_single(received, sent, from_R, to_R, group=self._group)
        return received.view(outputs_TH.dtype).view(outputs_TH.shape)

    def _deliver(self, prepared: _Prepared) -> bool:
        """Whether every expert lies whole in its receiver's staging memory; the same on all ranks."""
        exchange, batch = prepared.exchange, prepared.batch
        faults = exchange.deliver(batch)
        if exchange.failed_here and not self._failure:
            self._failure = "its part in the exchange failed; its log says why"
        return not faults

    def _write(self, prepared: _Prepared, *exchanged: SlabTensor) -> None:
        """exchanged: two slabs of the same size whose parts of it change places, or none."""
        size = self._memory.expert_bytes_L[self._layer]
        self._memory.write(self._layer, _SLOT, prepared.exchange.staging[0, :size])
        parts = [slab.bytes_EB[_SLOT] for slab in exchanged]
        for part, other in zip(parts, [part.clone() for part in reversed(parts)], strict=True):
            part.copy_(other)

    def _had_it(self, prepared: _Prepared) -> bool:
        """Whether what arrived is what our slot held before, as where replicas were loaded."""
        arrived = torch.zeros_like(prepared.checksums_S[:1])
        self._memory.checksum_packed(self._layer, prepared.exchange.staging[0], arrived)
        return bool(torch.equal(arrived, prepared.checksums_S[_SLOT : _SLOT + 1]))

    def _put_back(self, prepared: _Prepared) -> None:
        """Past the code that is tried."""
        for slab, kept in zip(self._slabs, prepared.kept, strict=True):
            slab.bytes_EB[_SLOT].copy_(kept)

    def _holds(self, prepared: _Prepared) -> bool:
        """Whether all slots of the layer have their bytes again."""
        same = all(
            torch.equal(now, before)
            for slab, kept in zip(self._slabs, prepared.kept, strict=True)
            for now, before in zip(
                slab.bytes_EB[_SLOT].split(_PIECE), kept.split(_PIECE), strict=True
            )
        )
        return same and torch.equal(self._checksums_S(), prepared.checksums_S)


def _any_failed(told_R: torch.Tensor) -> bool:
    return bool(told_R[:, 0].any())


def _arrival(
    before: _Before,
    moved_TH: torch.Tensor | None,
    restored_TH: torch.Tensor | None,
    replica: bool,
) -> Arrival:
    """moved_TH, restored_TH: None for what could not be computed. replica: whether one arrived where there
    was one, so that a move which did nothing would not show.
    """
    if moved_TH is None or restored_TH is None:
        return Arrival(Verdict.FAILED, noise=before.noise)
    moved = largest_difference(before.theirs_TH, moved_TH)
    missed = float(differences_T(before.theirs_TH, before.outputs_TH).min())
    restored = largest_difference(before.outputs_TH, restored_TH)
    verdict = verdict_of(before.noise, moved, math.inf if replica else missed, restored)
    if replica and verdict.allows_moves:
        verdict = Verdict.REPLICA
    return Arrival(verdict, before.noise, moved, missed, restored)


def _told_arrival(told: Sequence[float]) -> Arrival:
    has_failed, code, *numbers = told
    verdict = _VERDICTS[int(code)]
    if has_failed and verdict is not Verdict.NOT_RESTORED:
        verdict = Verdict.FAILED
    return Arrival(verdict, *numbers)


def _round_the_ring(memory: ExpertMemory, layer: int, rank: int, ranks: int) -> Batch:
    """The moves of a placement of as many experts as there are slots, to one where each rank has, in one
    slot of `layer`, what the rank before it had.
    """
    source = Placement.contiguous(
        num_layers=len(memory.expert_bytes_L),
        num_experts=ranks * memory.slots,
        num_ranks=ranks,
    )
    slots_LP = source.slots_LP.copy()
    moving_R = np.arange(ranks) * memory.slots + _SLOT
    slots_LP[layer, moving_R] = np.roll(slots_LP[layer, moving_R], 1)
    target = Placement(slots_LP, source.num_experts, ranks)
    (batch,) = schedule(
        source,
        target,
        target.even_quotas_LP(),
        topology=Topology.single_node(ranks),
        expert_bytes_L=memory.expert_bytes_L,
        pace=Pace.of_bytes(_PIECE),
        staging_slots=1,
        rank=rank,
    ).batches
    return batch
