"""Schedule: the difference between two placements, cut into batches and rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.migration.batches import Batch, Migration, Moves, Rounds
from ep_rebalance.migration.itinerary import itinerary
from ep_rebalance.migration.rounds import Limits, MoveColumns, fill_rounds
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.sources import IntArray, choose_sources
from ep_rebalance.topology import LINKS, Topology


def schedule(
    source: Placement,
    target: Placement,
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    pace: Pace,
    staging_slots: int,
    rank: int | None = None,
) -> Migration:
    """Cut the difference between two placements into batches and rounds.

    quotas_LP: float64 [L, P]. The quotas to serve `target` with.
    expert_bytes_L: L sizes, bytes. One packed expert of each layer.
    pace: bounds on what a rank sends, and on what it receives, in one round, in which a copy within a rank
        counts as both; and the order in which layers are committed.
    staging_slots: how many experts the staging memory of a rank holds.
    rank: whose itinerary the batches carry; none if None.

    Except for a few small operations per batch this is compiled code, which runs without the
    interpreter lock.

    Raises ValueError if the sizes do not match, or if a single layer overflows the staging memory.
    """
    _check_sizes(source, target, topology, expert_bytes_L, pace)
    bytes_L = np.array(expert_bytes_L, dtype=np.int64)
    layers = _layers_in_order(source, target, pace.layers, staging_slots)
    batches: tuple[Batch, ...] = ()
    if layers:
        moves = _moves(source, target, layers, topology, bytes_L, staging_slots)
        batches = tuple(_batches(moves, layers, source, bytes_L, pace, staging_slots, rank))
    return Migration(source=source, target=target, quotas_LP=quotas_LP, batches=batches, pace=pace)


def schedule_copies(
    placement: Placement,
    layer: int,
    copies: Sequence[tuple[int, int]],
    *,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    max_bytes: int,
    rank: int,
) -> Batch:
    """Experts of some slots copied into others that are to hold the same: one batch.

    copies: of each the slot that is read, and the one that is written, on another rank; at most one is
        written on each rank.
    max_bytes: bytes. The most that a rank sends, or receives, in a round.
    rank: whose itinerary the batch carries.
    """
    bytes_L = np.array(expert_bytes_L, dtype=np.int64)
    src_slot, dst_slot = np.array(copies, dtype=np.int64).T.copy()
    src_rank, dst_rank = src_slot // placement.slots_per_rank, dst_slot // placement.slots_per_rank
    links = [topology.link(int(src), int(dst)) for src, dst in zip(src_rank, dst_rank, strict=True)]
    moves = Moves(
        layer=np.full_like(dst_slot, layer),
        expert=placement.slots_LP[layer, dst_slot].astype(np.int64),
        src_rank=src_rank,
        src_slot=src_slot,
        dst_rank=dst_rank,
        dst_slot=dst_slot,
        link=np.array([LINKS.index(link) for link in links], dtype=np.int64),
        staging=np.zeros_like(dst_slot),
        size=np.full_like(dst_slot, bytes_L[layer]),
    )
    pace = Pace.of_bytes(max_bytes)
    (batch,) = _batches(moves, (layer,), placement, bytes_L, pace, 1, rank)
    return batch


def compile_schedule() -> None:
    """Compile all scheduling code, so that nothing is compiled while the engine serves.

    Every rank needs it. It takes seconds the first time on a machine; later starts load the cached
    code.
    """
    source = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
    target = Placement(source.slots_LP[:, [0, 2, 1, 3]], 4, 2)
    schedule(
        source,
        target,
        target.even_quotas_LP(),
        topology=Topology.single_node(2),
        expert_bytes_L=[1024],
        pace=Pace.of_bytes(512),
        staging_slots=1,
        rank=0,
    )


def _check_sizes(
    source: Placement,
    target: Placement,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    pace: Pace,
) -> None:
    if (source.slots_LP.shape, source.num_ranks) != (target.slots_LP.shape, target.num_ranks):
        raise ValueError(
            f"cannot migrate {source.slots_LP.shape} slots on {source.num_ranks} ranks "
            f"to {target.slots_LP.shape} on {target.num_ranks}"
        )
    if topology.num_ranks != source.num_ranks or len(expert_bytes_L) != source.num_layers:
        raise ValueError(
            f"{source.num_layers} layers on {source.num_ranks} ranks, but the topology has "
            f"{topology.num_ranks} ranks and {len(expert_bytes_L)} layers have an expert size"
        )
    if pace.max_bytes < 1 or pace.max_internode_bytes < 1 or min(expert_bytes_L) < 1:
        raise ValueError(
            f"{pace.max_bytes} bytes a round, {pace.max_internode_bytes} of them between nodes, and the "
            f"smallest expert, {min(expert_bytes_L)} bytes, must be positive"
        )


def _layers_in_order(
    source: Placement, target: Placement, first: Sequence[int], staging_slots: int
) -> tuple[int, ...]:
    """The layers with moves, in the order in which they are to be committed.

    first: those that come before the others.
    """
    changed_LP = source.slots_LP != target.slots_LP
    by_rank = source.num_layers, source.num_ranks, source.slots_per_rank
    arrivals_LR = changed_LP.reshape(by_rank).sum(axis=2)
    most_L = arrivals_LR.max(axis=1)
    for layer in np.flatnonzero(most_L > staging_slots).tolist():
        raise ValueError(
            f"layer {layer} changes {most_L[layer]} slots on rank {arrivals_LR[layer].argmax()}, "
            f"but the staging memory holds {staging_slots} experts"
        )
    changed = set(np.flatnonzero(most_L).tolist())
    given = [layer for layer in dict.fromkeys(first) if layer in changed]
    return (*given, *sorted(changed.difference(given)))


def _moves(
    source: Placement,
    target: Placement,
    layers: tuple[int, ...],
    topology: Topology,
    expert_bytes_L: IntArray,
    staging_slots: int,
) -> Moves:
    fetches = choose_sources(
        source, target, layers=layers, topology=topology, expert_bytes_L=expert_bytes_L
    )
    return Moves(
        layer=fetches.layer,
        expert=fetches.expert,
        src_rank=fetches.src_rank,
        src_slot=fetches.src_slot,
        dst_rank=fetches.dst_rank,
        dst_slot=fetches.dst_slot,
        link=fetches.link,
        staging=_places(fetches.dst_rank, source.num_ranks, staging_slots),
        size=expert_bytes_L[fetches.layer],
    )


@compiled
def _places(dst_rank_M: IntArray, num_ranks: int, staging_slots: int) -> IntArray:
    """int64 [M], a place in the staging memory for each move. The moves into a rank take its places in
    turn, because the places become free in the same order.
    """
    staged_R, place_M = np.zeros(num_ranks, np.int64), np.empty_like(dst_rank_M)
    for move, rank in enumerate(dst_rank_M):
        place_M[move] = staged_R[rank] % staging_slots
        staged_R[rank] += 1
    return place_M


def _batches(
    moves: Moves,
    layers: tuple[int, ...],
    source: Placement,
    expert_bytes_L: IntArray,
    pace: Pace,
    staging_slots: int,
    rank: int | None,
) -> Iterator[Batch]:
    """A batch for each round after which layers are whole."""
    turn_M = np.repeat(np.arange(len(layers)), _run_lengths(moves.layer))
    far_M = moves.over("internode").astype(np.int64)
    columns = MoveColumns(moves.src_rank, moves.dst_rank, moves.size, far_M, turn_M)
    limits = Limits(source.num_ranks, staging_slots, pace.max_bytes, pace.max_internode_bytes)
    first_N1, transfers_3X, last_K = fill_rounds(columns, limits)
    begin = 0
    for last in np.unique(last_K).tolist():
        turns = np.flatnonzero(last_K == last)
        first = first_N1[begin : last + 2]
        own_3X = np.ascontiguousarray(transfers_3X[:, first[0] : first[-1]])
        filled = (first - first[0], own_3X)
        part = None
        if rank is not None:
            part = itinerary(
                rank,
                moves,
                moves.staging,
                filled,
                num_ranks=source.num_ranks,
                slots_per_rank=source.slots_per_rank,
                expert_bytes_L=expert_bytes_L,
            )
        rounds = Rounds(first_N1=filled[0], move=own_3X[0], start=own_3X[1], stop=own_3X[2])
        bounds = np.searchsorted(turn_M, [turns[0], turns[-1] + 1])
        yield Batch(
            layers=layers[turns[0] : turns[-1] + 1],
            moves=moves.part(*bounds.tolist()),
            first_move=int(bounds[0]),
            rounds=rounds,
            itinerary=part,
        )
        begin = last + 1


def _run_lengths(layer_M: IntArray) -> IntArray:
    """How many moves each layer has, in the order of the moves, which lie layer by layer."""
    begins = np.flatnonzero(np.diff(layer_M, prepend=-1))
    lengths: IntArray = np.diff(begins, append=len(layer_M))
    return lengths
