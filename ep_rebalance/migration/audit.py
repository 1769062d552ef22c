"""Audit: whether this rank's slots still hold the bytes that were written into them.

A checksum of every slot is taken when the engine has loaded it and when a commit has written it. In the
background slot after slot is summed again, so many bytes in a step. On an accelerator that is done beside
the model's own work, and its result is read in a later step, so that the step path never waits.

Slots in which something is written meanwhile say nothing: they are summed again in their next turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ep_rebalance.config import AuditConfig
from ep_rebalance.host_memory import host_buffer, pins
from ep_rebalance.kernels.pack_experts import ALIGNMENT
from ep_rebalance.migration.batches import Batch
from ep_rebalance.migration.expert_memory import ExpertMemory

Slot = tuple[int, int]
"""Layer, and number of a slot over all ranks."""


@dataclass(slots=True)
class _Check:
    """A slot that is being summed.

    version: of the slot when it began.
    summed: bytes so far.
    downloading: whether all are, and the sum is on its way to the host.
    """

    layer: int
    local: int
    version: int
    summed: int = 0
    downloading: bool = False


class SlotAudit:
    """One rank's part.

    config: `slots_per_minute` is above 0.
    rank: this one, in the order of the placement.
    clock: seconds, never going back. When a slot is summed is this rank's own affair.

    found: this rank's slots that were found corrupted and that no other rank was told of yet.
    lost: slots that all ranks know to be corrupted, and that could not be repaired; the same on all ranks.
    asked: this rank's slots that are still to be checked because all were asked for.
    """

    def __init__(
        self,
        config: AuditConfig,
        memory: ExpertMemory,
        *,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found: list[Slot] = []
        self.lost: set[Slot] = set()
        self.asked = 0
        self._config = config
        self._memory = memory
        self._clock = clock
        self._first_slot = rank * memory.slots
        shape = len(memory.expert_bytes_L), memory.slots
        self._expected_LS = torch.zeros(shape, dtype=torch.int64, device=memory.device)
        self._known_LS = np.zeros(shape, dtype=bool)
        self._version_LS = np.zeros(shape, dtype=np.int64)
        # The sum of the slot that is checked, and behind it what is expected.
        self._sums = torch.zeros(2, dtype=torch.int64, device=memory.device)
        self._host = host_buffer((2,), torch.int64, memory.device)
        self._beside = _Beside(memory.device)
        self._check: _Check | None = None
        self._suspended = False
        self._turn, self._checked = 0, 0
        self._due = clock()

    def take_all(self) -> None:
        """Take the checksums of all slots, before serving. It reads all experts of this rank."""
        for layer, local in np.ndindex(*self._known_LS.shape):
            checksum = self._of(layer, local)
            checksum.zero_()
            self._memory.add_checksum(layer, local, 0, self._memory.expert_bytes_L[layer], checksum)
        self._known_LS[:] = True

    def step(self) -> None:
        """Sum some more bytes, between two forward passes. Never waits."""
        if self._suspended:
            return
        if self._check is None:
            self._check = self._next_check()
        if self._check is None:
            return
        if not self._check.downloading:
            self._sum_more(self._check)
        elif self._beside.done():
            self._judge(self._check)
            self._check = None

    def ask_all(self) -> None:
        """Check every slot once from now on, one a step, however many a minute allow."""
        self.asked = self._known_LS.size

    def take_checked(self) -> int:
        """How many slots this rank has checked since the last call."""
        checked, self._checked = self._checked, 0
        return checked

    def expected(self, layer: int, slot: int) -> torch.Tensor | None:
        """int64 [1] on the device, the checksum of a slot of this rank; None if it is not known, or the slot
        is another rank's.
        """
        local = slot - self._first_slot
        if not 0 <= local < self._memory.slots or not self._known_LS[layer, local]:
            return None
        return self._of(layer, local)

    def committed(
        self, batch: Batch, layers: Iterable[int], checksum_of: Callable[[int], torch.Tensor]
    ) -> None:
        """Slots were written, in stream order.

        layers: those of the batch that were written on this rank.
        checksum_of: int64 [1], of what is in a place of the staging memory.
        """
        written = set(layers)
        for move in batch.moves:
            slot = move.layer, move.dst_slot
            self.lost.discard(slot)
            local = move.dst_slot - self._first_slot
            if 0 <= local < self._memory.slots and move.layer in written:
                self._forget_found(slot)
                self._of(move.layer, local).copy_(checksum_of(move.staging))
                self._version_LS[move.layer, local] += 1
                self._known_LS[move.layer, local] = True

    def forget(self, layers: Iterable[int]) -> None:
        """The engine wrote these layers anew: their checksums are taken again, in the background, but as soon
        as may be, since what changes before that is taken for what was loaded.
        """
        for layer in layers:
            self._known_LS[layer] = False
            self._version_LS[layer] += 1
            self.found = [slot for slot in self.found if slot[0] != layer]
            self.ask_all()

    def forget_lost(self, layers: Iterable[int]) -> None:
        """All ranks serve these layers as they were loaded anew."""
        reloaded = set(layers)
        self.lost = {slot for slot in self.lost if slot[0] not in reloaded}

    def announced(self, slot: Slot) -> None:
        """All ranks know of a slot that was found."""
        self._forget_found(slot)

    def replace_memory(self, memory: ExpertMemory) -> None:
        """Experts are in other tensors, of the same sizes."""
        self.settle()
        self._memory = memory

    def suspend(self) -> None:
        """Check nothing: experts may be nowhere."""
        self.settle()
        self._suspended = True

    def resume(self) -> None:
        self._suspended = False

    def settle(self) -> None:
        """Wait until nothing is read any more, as before the experts' memory is given back."""
        self._beside.wait()
        self._check = None

    def _next_check(self) -> _Check | None:
        now = self._clock()
        if not self.asked and now < self._due:
            return None
        layers, slots = self._known_LS.shape
        for _ in range(layers * slots):
            layer, local = divmod(self._turn, slots)
            self._turn = (self._turn + 1) % (layers * slots)
            self.asked = max(self.asked - 1, 0)
            slot = layer, self._first_slot + local
            if slot not in self.lost and slot not in self.found:
                # Also after a check that was asked for before it was due, the next is due within a period.
                period = 60.0 / self._config.slots_per_minute
                self._due = max(min(self._due, now) + period, now)
                return _Check(layer, local, int(self._version_LS[layer, local]))
        self._due = now + 60.0
        return None

    def _sum_more(self, check: _Check) -> None:
        size = self._memory.expert_bytes_L[check.layer]
        most = max(self._config.max_bytes_per_step // ALIGNMENT, 1) * ALIGNMENT
        stop = min(check.summed + most, size)
        with self._beside.work():
            if not check.summed:
                self._sums.zero_()
            self._memory.add_checksum(check.layer, check.local, check.summed, stop, self._sums[:1])
            check.summed, check.downloading = stop, stop == size
            if check.downloading:
                self._sums[1:].copy_(self._of(check.layer, check.local))
                self._host.copy_(self._sums, non_blocking=True)

    def _judge(self, check: _Check) -> None:
        """What was summed is on the host."""
        layer, local = check.layer, check.local
        if check.version != self._version_LS[layer, local]:
            return
        if not self._known_LS[layer, local]:
            self._of(layer, local).copy_(self._sums[:1])
            self._known_LS[layer, local] = True
            return
        self._checked += 1
        if self._host[0] != self._host[1]:
            self.found.append((layer, self._first_slot + local))

    def _of(self, layer: int, local: int) -> torch.Tensor:
        return self._expected_LS[layer, local : local + 1]

    def _forget_found(self, slot: Slot) -> None:
        self.found = [other for other in self.found if other != slot]


class _Beside:
    """A stream beside the one of the model; on CPU work is done when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None
        self._event: torch.Event | None = None
        if pins(device):
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)
            self._device = device
            self._event = torch.Event(device)
        self._recorded = False

    @contextmanager
    def work(self) -> Iterator[None]:
        """What the body launches comes after all that the model's stream has been given so far."""
        if self._event is None:
            yield
            return
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            yield
            self._event.record(self._stream)
        self._recorded = True

    def done(self) -> bool:
        """Whether all work is. Never waits."""
        return self._event is None or not self._recorded or self._event.query()

    def wait(self) -> None:
        if self._event is not None and self._recorded:
            self._event.synchronize()
