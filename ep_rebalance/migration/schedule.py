"""Schedule: the difference between two placements, cut into batches and rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.migration.batches import Batch, Migration, Moves, Rounds
from ep_rebalance.migration.itinerary import itinerary
from ep_rebalance.migration.rounds import fill_rounds
from ep_rebalance.placement import Placement
from ep_rebalance.planning.sources import IntArray, choose_sources
from ep_rebalance.topology import Topology


def schedule(
    source: Placement,
    target: Placement,
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    max_bytes_per_round: int,
    staging_slots: int,
    rank: int | None = None,
) -> Migration:
    """Cut the difference between two placements into batches and rounds.

    quotas_LP: float64 [L, P]. The quotas to serve `target` with.
    expert_bytes_L: L sizes, bytes. One packed expert of each layer.
    max_bytes_per_round: bound on what a rank sends, and on what it receives, in one round. A copy
        within a rank counts as both.
    staging_slots: how many experts the staging memory of a rank holds.
    rank: whose itinerary the batches carry; none if None.

    Except for a few small operations per batch this is compiled code, which runs without the
    interpreter lock.

    Raises ValueError if the sizes do not match, or if a single layer overflows the staging memory.
    """
    _check_sizes(source, target, topology, expert_bytes_L, max_bytes_per_round)
    bytes_L = np.array(expert_bytes_L, dtype=np.int64)
    batches = []
    for layers in _batch_layers(_arrivals_LR(source, target), staging_slots):
        moves = _stage_moves(source, target, layers, topology, bytes_L)
        batches.append(_batch(layers, moves, source, bytes_L, max_bytes_per_round, rank))
    return Migration(source=source, target=target, quotas_LP=quotas_LP, batches=tuple(batches))


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
        max_bytes_per_round=512,
        staging_slots=1,
        rank=0,
    )


def _check_sizes(
    source: Placement,
    target: Placement,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    max_bytes_per_round: int,
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
    if max_bytes_per_round < 1 or min(expert_bytes_L) < 1:
        raise ValueError(
            f"max_bytes_per_round={max_bytes_per_round} and the smallest expert, "
            f"{min(expert_bytes_L)} bytes, must be positive"
        )


def _arrivals_LR(source: Placement, target: Placement) -> NDArray[np.int64]:
    changed_LP = source.slots_LP != target.slots_LP
    arrivals_LR: NDArray[np.int64] = changed_LP.reshape(
        source.num_layers, source.num_ranks, source.slots_per_rank
    ).sum(axis=2)
    return arrivals_LR


def _batch_layers(arrivals_LR: NDArray[np.int64], staging_slots: int) -> Iterator[tuple[int, ...]]:
    """Runs of layers with moves, each as long as the staging memory of every rank allows."""
    layers: list[int] = []
    staged_R = np.zeros(arrivals_LR.shape[1], dtype=np.int64)
    for layer in np.flatnonzero(arrivals_LR.any(axis=1)).tolist():
        arrivals_R = arrivals_LR[layer]
        if arrivals_R.max() > staging_slots:
            raise ValueError(
                f"layer {layer} changes {arrivals_R.max()} slots on rank {arrivals_R.argmax()}, "
                f"but the staging memory holds {staging_slots} experts"
            )
        if (staged_R + arrivals_R).max() > staging_slots:
            yield tuple(layers)
            layers, staged_R = [], np.zeros_like(staged_R)
        layers.append(layer)
        staged_R = staged_R + arrivals_R
    if layers:
        yield tuple(layers)


def _stage_moves(
    source: Placement,
    target: Placement,
    layers: tuple[int, ...],
    topology: Topology,
    expert_bytes_L: IntArray,
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
        staging=_places(fetches.dst_rank, source.num_ranks),
    )


@compiled
def _places(dst_rank_M: IntArray, num_ranks: int) -> IntArray:
    """int64 [M], the number of each move among those into the same rank."""
    staged_R, place_M = np.zeros(num_ranks, np.int64), np.empty_like(dst_rank_M)
    for move, rank in enumerate(dst_rank_M):
        place_M[move] = staged_R[rank]
        staged_R[rank] += 1
    return place_M


def _batch(
    layers: tuple[int, ...],
    moves: Moves,
    source: Placement,
    expert_bytes_L: IntArray,
    max_bytes: int,
    rank: int | None,
) -> Batch:
    bytes_M = expert_bytes_L[moves.layer]
    filled = fill_rounds(moves.src_rank, moves.dst_rank, bytes_M, source.num_ranks, max_bytes)
    first_N1, (move, start, stop) = filled
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
    rounds = Rounds(first_N1=first_N1, move=move, start=start, stop=stop)
    return Batch(layers=layers, moves=moves, rounds=rounds, itinerary=part)
