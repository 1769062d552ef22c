"""Copies: redundant slots, filled from the slots that an engine's loader has written.

Of some checkpoints a loader writes each expert once, into the first of its slots, and leaves the others with
what was in memory. Until they are filled, all tokens of an expert go to its first slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.migration.audit import SlotAudit
from ep_rebalance.migration.batches import Batch
from ep_rebalance.migration.commit import write_arrivals
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.round_exchange import Faults, RoundExchange
from ep_rebalance.migration.schedule import schedule_copies
from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology


def fill_copies(
    placement: Placement,
    layers: Iterable[int],
    exchange: RoundExchange,
    memory: ExpertMemory,
    audit: SlotAudit | None = None,
) -> Faults:
    """Copy each expert from its first slot into all others that are to hold it. Collective; returns what the
    ranks voted on the last batch. After a fault, some copies may not be there.

    placement: which expert each slot is to hold.
    exchange: of `memory`. It stages at least one expert.
    """
    faults = Faults(transport=0, checksum=0)
    for batch in _batches(placement, layers, memory, exchange):
        exchange.begin_batch(batch)
        faults = exchange.deliver(batch)
        if faults:
            break
        write_arrivals(batch, batch.layers, exchange.staging, memory, exchange.rank)
        if audit is not None:
            audit.committed(batch, batch.layers, exchange.checksum_of)
    return faults


def quotas_without_copies_LP(placement: Placement) -> NDArray[np.float64]:
    """float64 [L, P], quotas that send all tokens of an expert to its first slot."""
    quotas_LP = np.zeros(placement.slots_LP.shape)
    for layer, slots_P in enumerate(placement.slots_LP):
        quotas_LP[layer, _first_slots(slots_P)] = 1.0
    return quotas_LP


def _first_slots(slots_P: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64 [E], the first slot of each expert."""
    first_E: NDArray[np.int64] = np.unique(slots_P, return_index=True)[1]
    return first_E


def _batches(
    placement: Placement, layers: Iterable[int], memory: ExpertMemory, exchange: RoundExchange
) -> Iterator[Batch]:
    """Each brings at most one expert to every rank, so that one is staged at a time."""
    slots = placement.slots_per_rank
    for layer in layers:
        slots_P = placement.slots_LP[layer]
        first_E = _first_slots(slots_P)
        copies = np.setdiff1d(np.arange(len(slots_P)), first_E)
        for place in range(slots):
            here = copies[copies % slots == place]
            if len(here):
                yield schedule_copies(
                    placement,
                    layer,
                    list(zip(first_E[slots_P[here]].tolist(), here.tolist(), strict=True)),
                    topology=Topology.single_node(placement.num_ranks),
                    expert_bytes_L=memory.expert_bytes_L,
                    max_bytes=exchange.max_bytes,
                    rank=exchange.rank,
                )
