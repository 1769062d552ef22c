"""Auditor: what all ranks do about slots that one of them found corrupted.

Each rank sums its own slots (`migration/audit.py`). What it finds travels in the snapshot, and all ranks act
on it in the same step: they copy the expert from a rank whose replica is whole, or tell that there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import replace

from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.collectives.snapshot import Flags
from ep_rebalance.telemetry.events import Event, SlotCorrupted, SlotsAudited

logger = logging.getLogger(__name__)


class Auditor:
    """One rank's part.

    tell: called with each event.
    """

    def __init__(
        self, migrator: Migrator, *, rank: int, ranks: int, tell: Callable[[Event], None]
    ) -> None:
        self._migrator = migrator
        self._rank, self._ranks = rank, ranks
        self._tell = tell
        self._turn = 0

    def step(self) -> None:
        """Check some more bytes, between two forward passes."""
        if self._migrator.audit is not None:
            self._migrator.audit.step()

    def announced(self, flags: Flags) -> Flags:
        """These flags of the next snapshot with what this rank tells of its slots; once for each snapshot."""
        audit = self._migrator.audit
        if audit is None:
            return flags
        turn, self._turn = self._turn, (self._turn + 1) % self._ranks
        corrupted = 0
        if turn == self._rank and audit.found:
            layer, slot = audit.found[0]
            corrupted = 1 + layer * self._migrator.served.placement.num_slots + slot
        return replace(flags, audited=audit.take_checked(), corrupted=corrupted)

    def follow(self, told: Flags, *, replaced: bool) -> Generator[None, None, None]:
        """Do what follows from a snapshot, the same on all ranks: one `yield` for each engine step.

        told: the sums over all ranks.
        replaced: whether some ranks were told of new weights that are not served yet. A rank that was not
            told may hold them, too, and take them for corruption: what it still finds later is told again.
        """
        audit = self._migrator.audit
        if audit is None:
            return
        if told.audited:
            self._tell(SlotsAudited(told.audited))
        if told.audit_asked:
            audit.ask_all()
        if told.corrupted and not replaced:
            yield from self._repair(
                *divmod(told.corrupted - 1, self._migrator.served.placement.num_slots)
            )

    def _repair(self, layer: int, slot: int) -> Generator[None, None, None]:
        """Copy the expert from the first replica that is whole, in the order of their slots."""
        audit, placement = self._migrator.audit, self._migrator.served.placement
        assert audit is not None
        audit.announced((layer, slot))
        experts_P = placement.slots_LP[layer]
        audit.lost.add((layer, slot))
        source: int | None = None
        for other in (experts_P == experts_P[slot]).nonzero()[0].tolist():
            if (layer, other) in audit.lost:
                continue
            faults = yield from self._migrator.repair(layer, other, slot)
            if faults.replaced or faults.transport:
                # It holds something else by now, or it is found again in its next turn.
                audit.lost.discard((layer, slot))
                return
            if not faults:
                source = other
                break
        self._tell(
            SlotCorrupted(
                layer=layer,
                expert=int(experts_P[slot]),
                slot=slot,
                ep_rank=int(placement.rank_of(slot)),
                source=source,
            )
        )
