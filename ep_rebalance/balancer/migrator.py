"""Migrator: carries migrations out on one rank, and holds what is served.

A batch goes through its rounds, the vote of all ranks on what arrived, and the commit; then the next
one begins. What is served changes only here, and on every rank in the same step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.migration import Batch, schedule
from ep_rebalance.migration.audit import SlotAudit
from ep_rebalance.migration.commit import (
    Commit,
    PreparedMigration,
    Split,
    commit_batch,
    commit_split,
    write_arrivals,
)
from ep_rebalance.migration.configured import configured_staging
from ep_rebalance.migration.copies import fill_copies, quotas_without_copies_LP
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.round_exchange import (
    Faults,
    RoundExchange,
    StagingFull,
    standstill_exchange,
)
from ep_rebalance.migration.schedule import schedule_copies
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace, most_bytes_per_step
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.events import (
    BatchCommitted,
    CommitStalled,
    Event,
    GenerationServed,
    GotUnstuck,
    QuotasChanged,
    RoundStalled,
)
from ep_rebalance.telemetry.stall_clock import StallClock
from ep_rebalance.topology import Topology

logger = logging.getLogger(__name__)


class NotTakenUp(RuntimeError):
    """All ranks have given a saved placement up together, and are in step."""


@dataclass(frozen=True, slots=True)
class MigrationOutcome:
    """How a migration ended.

    batches: how many were committed.
    fault: what ended it before the last one, or "".
    """

    batches: int
    fault: str


class Migrator:
    """One rank's part in every migration.

    placement: what the engine loaded.
    memory: this rank's expert weights; None in mode observe, where nothing is ever moved.
    tell: called with each event.

    served: what all ranks have agreed to serve. This rank's tables differ only while its weights were
        replaced and others' not yet.
    agreed_reloads: how many reloads of weights `served` reflects; the same on all ranks.
    staging_slots: experts. How many fit into the staging memory; 0 where nothing is moved.
    audit: checks this rank's slots; None unless `audit.slots_per_minute` is set.
    before: what was served before the first commit since `take_before`; None if there was none.
    """

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        placement: Placement,
        counts: RoutingTables,
        memory: ExpertMemory | None,
        group: dist.ProcessGroup,
        topology: Topology,
        tell: Callable[[Event], None],
    ) -> None:
        self.served = Served.initial(placement)
        self.before: Served | None = None
        self.agreed_reloads = 0
        # Layers of each reload that `served` does not reflect.
        self._told: list[tuple[int, ...]] = []
        self._may_move = True
        self._loaded = self.served
        # What the engine's loader has surely written; it may have left copies as they were.
        self._loaded_once = self.served.with_quotas(quotas_without_copies_LP(placement))
        self._unfilled: set[int] = set()  # layers, the same on all ranks
        self._unfilled_for = ""  # the fault that was logged
        self._actions = 0
        self.staging_slots = 0
        self._counts = counts
        self._memory = memory
        self._group = group
        self._rank = dist.get_rank(group)
        self._topology = topology
        self._tell = tell
        device = counts.counts_LAE.device
        self._round_stalls = StallClock(device, lambda seconds: tell(RoundStalled(seconds)))
        self._commit_stalls = StallClock(device, lambda seconds: tell(CommitStalled(seconds)))
        self._exchange: RoundExchange | None = None
        self.audit: SlotAudit | None = None
        if memory is not None:
            sizes = memory.expert_bytes_L
            if config.audit.slots_per_minute:
                self.audit = SlotAudit(config.audit, memory, rank=self._rank)
            self.staging_slots = configured_staging(config, placement.slots_per_rank, sizes)
            self._exchange = RoundExchange(
                group=group,
                memory=memory,
                max_bytes=most_bytes_per_step(config.migration.max_bytes_per_step, sizes),
                staging_slots=self.staging_slots,
                audit=self.audit,
            )
        counts.set_dispatch(range(placement.num_layers), placement, self.served.quotas_LP)

    def warm_up(self) -> None:
        """Collective, before serving; see `RoundExchange.warm_up`."""
        if self._exchange is not None:
            self._exchange.warm_up()

    @property
    def reserved_bytes(self) -> int:
        """Bytes on the device that migrations need, for staging and for what a step sends and receives."""
        return 0 if self._exchange is None else self._exchange.reserved_bytes

    @property
    def expert_bytes_L(self) -> tuple[int, ...]:
        """L sizes, bytes. One packed expert of each layer; () where nothing is moved."""
        return () if self._memory is None else self._memory.expert_bytes_L

    def migrate(self, prepared: PreparedMigration) -> Generator[None, None, MigrationOutcome]:
        """Carry a migration out: one `yield` per engine step, `num_steps` of them unless a fault ends it.

        A batch is committed in the step in which the next one's first round is made. Batches committed
        before a fault stay in service, under their own generation.
        """
        assert self._exchange is not None, "mode observe moves nothing"
        fault, batches = "", 0
        for commit in prepared.commits:
            fault = yield from self._move(commit.batch, self._exchange)
            if fault:
                break
            self._commit(commit, self._exchange)
            batches += 1
        if not fault:
            self._take_up_rest(prepared)
        self._serve(self.served.numbered(prepared.migration.source))
        return MigrationOutcome(batches=batches, fault=fault)

    def repair(self, layer: int, source: int, slot: int) -> Generator[None, None, Faults]:
        """Copy an expert from one slot over another that is to hold the same: one `yield` per engine step.

        Only what has the checksum that `slot` must have is written. The placement stays as it is.
        """
        assert self._exchange is not None
        assert self.audit is not None
        batch = schedule_copies(
            self.served.placement,
            layer,
            [(source, slot)],
            topology=self._topology,
            expert_bytes_L=self.expert_bytes_L,
            max_bytes=self._exchange.max_bytes,
            rank=self._rank,
        )
        expected = self.audit.expected(layer, slot)
        known = {} if expected is None else {0: expected}
        faults = yield from self._exchanged(batch, self._exchange, known)
        if not faults:
            self._write_repaired(batch, self._exchange, self.audit)
        return faults

    def _write_repaired(self, batch: Batch, exchange: RoundExchange, audit: SlotAudit) -> None:
        assert self._memory is not None
        layers = self._not_replaced(batch.layers)
        with self._commit_stalls.stall():
            write_arrivals(batch, layers, exchange.staging, self._memory, self._rank)
        audit.committed(batch, layers, exchange.checksum_of)
        self._actions += 1

    def restore(
        self, placement: Placement, quotas_LP: NDArray[np.float64], generation: int
    ) -> None:
        """Serve a saved placement instead of what was loaded. Collective; returns when all ranks have it.

        quotas_LP: float64 [L, P].
        generation: the number to serve it under.

        Raises NotTakenUp, on all ranks or on none, if experts did not arrive whole, if those of a rank may
        not be moved or were replaced again meanwhile, or if memory for them is short. Batches that were
        committed before that stay in service, under the next generation. Whatever else is raised leaves this
        rank out of step.
        """
        assert self._memory is not None, "mode observe moves nothing"
        exchange = self._roomy_exchange(placement.slots_per_rank, self._memory)
        source = self.served.placement
        migration = schedule(
            source,
            placement,
            quotas_LP,
            topology=self._topology,
            expert_bytes_L=self._memory.expert_bytes_L,
            pace=Pace.of_bytes(exchange.max_bytes),
            staging_slots=placement.slots_per_rank,
            rank=self._rank,
        )
        prepared = PreparedMigration.of(migration, self._counts)
        for commit in prepared.commits:
            exchange.begin_batch(commit.batch)
            if faults := exchange.deliver(commit.batch, replaced=self._votes_down):
                self._serve(self.served.numbered(source))
                raise NotTakenUp(f"the saved placement could not be taken up: {faults}")
            self._commit(commit, exchange)
        self._take_up(prepared.split)
        self._serve(replace(self.served, generation=generation))

    def _roomy_exchange(self, staging_slots: int, memory: ExpertMemory) -> RoundExchange:
        """An exchange that stages as many experts at once as a rank holds. Collective.

        Raises NotTakenUp on all ranks if one of them lacks the memory.
        """
        exchange = standstill_exchange(
            group=self._group, memory=memory, staging_slots=staging_slots, audit=self.audit
        )
        # Also a rank that failed takes part, so that the others do not wait for it in their exchange.
        lacking = self._count_ranks(exchange is None)
        if exchange is None or lacking:
            raise NotTakenUp(f"{lacking} rank(s) lack memory for experts on their way")
        return exchange

    def _count_ranks(self, true_here: bool) -> int:
        """On how many ranks something is so. Collective, and waits for the device."""
        count = torch.tensor([int(true_here)], device=self._counts.counts_LAE.device)
        dist.all_reduce(count, group=self._group)
        return int(count.item())

    @property
    def reloads(self) -> int:
        """How often the engine has replaced weights of this rank."""
        return self.agreed_reloads + len(self._told)

    @property
    def _holds_loaded(self) -> bool:
        """Whether this rank's weights were replaced and `served` does not reflect it yet."""
        return bool(self._told)

    @property
    def _votes_down(self) -> bool:
        """Whether this rank holds other experts than `served` says, or may not move them."""
        return self._holds_loaded or not self._may_move or bool(self._unfilled)

    @property
    def awaits_copies(self) -> bool:
        """Whether copies of reloaded experts are still to be written; the same on all ranks."""
        return bool(self._unfilled)

    @property
    def has_moved_experts(self) -> bool:
        """Whether any slot holds another expert than was loaded into it."""
        return self.served.placement != self._loaded.placement

    def weights_replaced(self, layers: tuple[int, ...]) -> None:
        """The engine wrote all slots of `layers` on this rank anew, in the order in which it loads them.

        From now on this rank sends its tokens there, to the first slot of each expert: not every loader
        writes the others. `served` stays what all ranks agree on. Until `serve_loaded`, nothing is committed
        to these layers on this rank, and it votes every batch down.
        """
        self._told.append(layers)
        if self.audit is not None:
            self.audit.forget(layers)
        once = self._loaded_once
        self._counts.set_dispatch(layers, once.placement, once.quotas_LP, strictly=True)

    def replace_memory(self, memory: ExpertMemory) -> None:
        """Use other tensors, which hold the experts now. Raises ValueError if their sizes differ."""
        assert self._exchange is not None, "mode observe moves nothing"
        self._exchange.replace_memory(memory)
        if self.audit is not None:
            self.audit.replace_memory(memory)
        self._memory = memory

    def refuse_moves(self) -> None:
        """Vote every batch down from now on."""
        self._may_move = False
        if self.audit is not None:
            self.audit.suspend()

    def allow_moves(self) -> None:
        """Vote by what became of each batch again."""
        self._may_move = True
        if self.audit is not None:
            self.audit.resume()

    def layers_reloaded(self, reloads: int) -> tuple[int, ...]:
        """Layers that the engine replaced since what `served` reflects, up to the `reloads`-th time."""
        told = self._told[: reloads - self.agreed_reloads]
        return tuple(sorted({layer for layers in told for layer in layers}))

    def serve_loaded(self, reloads: int) -> None:
        """Serve reloaded layers as they were loaded, now that every rank was told `reloads` times.

        If this rank has been told once more since, a later snapshot will show it.
        """
        layers = self.layers_reloaded(reloads)
        if self.audit is not None:
            self.audit.forget_lost(layers)
        self._told = self._told[reloads - self.agreed_reloads :]
        self.agreed_reloads = reloads
        self._serve(self.served.reloaded(layers, self._loaded_once))
        if self._loaded.placement.num_redundant:
            self._unfilled.update(layers)
            self.fill_copies()

    def fill_copies(self) -> None:
        """Write the copies of experts in layers that were loaded anew, and serve them. Collective if there
        are any, and returns when all ranks have them.

        Until then these layers are served from the first slots of their experts, and nothing moves. As long
        as a rank has other weights, or some that may not be moved, that is left for a later call. So is a
        layer in which a copy did not arrive whole.
        """
        if not self._unfilled or self._count_ranks(self._holds_loaded or not self._may_move):
            return
        assert self._memory is not None, "mode observe is told of no reload"
        began, fault, filled = time.perf_counter(), "", []
        exchange = self._exchange_of_copies(self._memory)
        for layer in sorted(self._unfilled):
            faults = fill_copies(
                self._loaded.placement, [layer], exchange, self._memory, audit=self.audit
            )
            if faults:
                fault = str(faults)
            else:
                filled.append(layer)
        self._serve_copies(filled)
        self._tell_of_copies(fault, len(filled), time.perf_counter() - began)

    def _exchange_of_copies(self, memory: ExpertMemory) -> RoundExchange:
        """Collective."""
        assert self._exchange is not None, "it moves experts"
        try:
            return self._roomy_exchange(1, memory)
        except NotTakenUp:  # on all ranks: what was reserved at the start is there
            return self._exchange

    def _serve_copies(self, layers: list[int]) -> None:
        self._unfilled.difference_update(layers)
        loaded = self._loaded
        self._counts.set_dispatch(layers, loaded.placement, loaded.quotas_LP)
        self.served = self.served.with_layers(layers, self.served.placement, loaded.quotas_LP)

    def _tell_of_copies(self, fault: str, filled: int, seconds: float) -> None:
        """The same fault is logged once, since it may come again with every snapshot."""
        if fault and fault != self._unfilled_for:
            logger.error(
                "ep_rebalance: copies of experts in %d layers are not served yet: %s",
                len(self._unfilled),
                fault,
            )
        elif filled and self._rank == 0:
            logger.info(
                "ep_rebalance: all ranks waited %.2f s for copies of experts in %d layers",
                seconds,
                filled,
            )
        self._unfilled_for = fault
        if not fault:
            self._tell(GotUnstuck())

    def serve_split(self, split: Split) -> None:
        """Serve the same placement with other quotas."""
        self._take_up(split)
        if not self._unfilled:
            self._tell(QuotasChanged())

    def take_before(self) -> Served | None:
        """`before`, which is None from then on."""
        before, self.before = self.before, None
        return before

    def take_actions(self) -> int:
        """Number of rounds and commits that this rank has made since the previous call."""
        actions, self._actions = self._actions, 0
        return actions

    def read_stalls(self) -> None:
        """Report the stalls of rounds and commits that the device has finished."""
        self._round_stalls.read()
        self._commit_stalls.read()

    def _move(self, batch: Batch, exchange: RoundExchange) -> Generator[None, None, str]:
        """All rounds of a batch, and the vote on it in the step of the last one. Returns the fault, or "" if
        all ranks may commit.
        """
        try:
            faults = yield from self._exchanged(batch, exchange)
        except StagingFull as error:  # the same on all ranks; any other error ends this process
            logger.exception("ep_rebalance: the migration cannot go on")
            return str(error)
        if faults.checksum and self.audit is not None:
            self.audit.ask_all()  # a sender's own slot may be what has changed
        return str(faults) if faults else ""

    def _exchanged(
        self,
        batch: Batch,
        exchange: RoundExchange,
        known: Mapping[int, torch.Tensor] | None = None,
    ) -> Generator[None, None, Faults]:
        """What the ranks voted after all rounds of a batch. known: see `RoundExchange.vote`.

        Raises StagingFull before the first of them.
        """
        exchange.begin_batch(batch)
        last = len(batch.rounds) - 1
        for number in range(last):
            with self._round_stalls.stall():
                exchange.exchange(batch, number)
            self._actions += 1
            yield
        with self._round_stalls.stall():
            exchange.exchange(batch, last)
            vote = exchange.vote(batch, replaced=self._votes_down, known=known)
        self._actions += 1
        yield  # the votes are copied to the host beside the next step
        return exchange.faults_of(vote)

    def _commit(self, commit: Commit, exchange: RoundExchange) -> None:
        assert self._memory is not None
        # Layers replaced since the vote keep what the engine wrote: staging holds experts of the old weights.
        # Others commit, so `served` must still follow; `serve_loaded` will correct it on all ranks.
        layers = self._not_replaced(commit.batch.layers)
        self.before = self.before or self.served
        self._counts.book_earlier(sorted(layers))
        if self.audit is not None:
            self.audit.committed(commit.batch, layers, exchange.checksum_of)
        if not layers:
            self.served = commit.serves(self.served)
            return
        with self._commit_stalls.stall():
            self.served = commit_batch(
                commit,
                self.served,
                layers=layers,
                staging=exchange.staging,
                memory=self._memory,
                counts=self._counts,
                rank=self._rank,
            )
        self._tell(BatchCommitted(commit.batch))
        self._actions += 1

    def _take_up_rest(self, prepared: PreparedMigration) -> None:
        """Split tokens anew also in layers whose quotas changed and experts did not."""
        if self.before is not None:
            moved = {layer for commit in prepared.commits for layer in commit.batch.layers}
            rest = set(range(self.served.placement.num_layers)) - moved
            self._counts.book_earlier(sorted(rest))
        self._take_up(prepared.split)

    def _take_up(self, split: Split) -> None:
        if self._unfilled:
            return  # it would send tokens to copies that are not there
        if self._holds_loaded:
            every = range(self.served.placement.num_layers)
            self._counts.serve(self._not_replaced(every), split.tables)
            self.served = self.served.with_quotas(split.quotas_LP)
        else:
            self.served = commit_split(split, self.served, self._counts)

    def _not_replaced(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Those of `layers` that this rank serves as `served` says."""
        replaced = {layer for told in self._told for layer in told}
        return tuple(layer for layer in layers if layer not in replaced)

    def _serve(self, served: Served) -> None:
        """Set what is served, and report its generation, which may be new."""
        self.served = served
        self._tell(GenerationServed(served.generation))
