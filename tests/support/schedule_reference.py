"""The schedule as it reads in plain Python, one object for each transfer: what the compiled one must
give to the last byte.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ep_rebalance.migration import Migration, Move
from ep_rebalance.placement import Placement
from ep_rebalance.topology import LINKS, Topology

CHUNK_BYTES = 256

Transfer = tuple[int, int, int]
"""Number of the move, first byte, byte behind the last."""
PlainBatch = tuple[tuple[int, ...], list[Move], list[list[Transfer]]]
"""Layers, moves, rounds."""


def plain(migration: Migration) -> list[PlainBatch]:
    """What the columns of a migration say."""
    return [
        (batch.layers, list(batch.moves), transfers_by_round(batch)) for batch in migration.batches
    ]


def transfers_by_round(batch) -> list[list[Transfer]]:
    rounds = batch.rounds
    transfers = list(
        zip(rounds.move.tolist(), rounds.start.tolist(), rounds.stop.tolist(), strict=True)
    )
    first = rounds.first_N1.tolist()
    return [transfers[first[n] : first[n + 1]] for n in range(len(rounds))]


def schedule_reference(
    source: Placement,
    target: Placement,
    *,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    max_bytes_per_round: int,
    staging_slots: int,
) -> list[PlainBatch]:
    batches: list[PlainBatch] = []
    for layers in batch_layers(source, target, staging_slots):
        moves = stage_moves(source, target, layers, topology, expert_bytes_L)
        sizes = [expert_bytes_L[move.layer] for move in moves]
        rounds = list(fill_rounds(moves, sizes, source.num_ranks, max_bytes_per_round))
        batches.append((layers, moves, rounds))
    return batches


def batch_layers(source: Placement, target: Placement, staging_slots: int):
    layers: list[int] = []
    staged_R = np.zeros(source.num_ranks, dtype=np.int64)
    changed_LP = source.slots_LP != target.slots_LP
    for layer in np.flatnonzero(changed_LP.any(axis=1)).tolist():
        arrivals_R = changed_LP[layer].reshape(source.num_ranks, -1).sum(axis=1)
        if (staged_R + arrivals_R).max() > staging_slots:
            yield tuple(layers)
            layers, staged_R = [], np.zeros_like(staged_R)
        layers.append(layer)
        staged_R = staged_R + arrivals_R
    if layers:
        yield tuple(layers)


def stage_moves(source, target, layers, topology, expert_bytes_L) -> list[Move]:
    sent_bytes_R, staged_R = [0] * source.num_ranks, [0] * source.num_ranks
    moves = []
    for layer in layers:
        for dst_slot in np.flatnonzero(source.slots_LP[layer] != target.slots_LP[layer]).tolist():
            expert, dst_rank = int(target.slots_LP[layer, dst_slot]), rank_of(source, dst_slot)
            replicas = np.flatnonzero(source.slots_LP[layer] == expert).tolist()
            _, _, src_slot = min(
                (
                    LINKS.index(topology.link(rank_of(source, slot), dst_rank)),
                    sent_bytes_R[rank_of(source, slot)],
                    slot,
                )
                for slot in replicas
            )
            src_rank = rank_of(source, src_slot)
            move = Move(
                layer=layer,
                expert=expert,
                src_rank=src_rank,
                src_slot=src_slot,
                dst_rank=dst_rank,
                dst_slot=dst_slot,
                link=topology.link(src_rank, dst_rank),
                staging=staged_R[dst_rank],
            )
            if move.link != "local":
                sent_bytes_R[src_rank] += expert_bytes_L[layer]
            staged_R[dst_rank] += 1
            moves.append(move)
    return moves


def rank_of(placement: Placement, slot: int) -> int:
    return slot // placement.slots_per_rank


def fill_rounds(
    moves: list[Move], sizes: list[int], num_ranks: int, max_bytes: int
) -> Iterator[list[Transfer]]:
    left = list(sizes)
    while any(left):
        urgency = urgency_of(moves, left, num_ranks)
        order = sorted((i for i in range(len(moves)) if left[i]), key=lambda i: (-urgency[i], i))
        send_R, receive_R = [max_bytes] * num_ranks, [max_bytes] * num_ranks
        chunk, transfers = min(CHUNK_BYTES, max_bytes), []
        for index in order:
            move = moves[index]
            room = min(send_R[move.src_rank], receive_R[move.dst_rank])
            size = left[index] if left[index] <= room else room // chunk * chunk
            if not size:
                continue
            start = sizes[index] - left[index]
            transfers.append((index, start, start + size))
            left[index] -= size
            send_R[move.src_rank] -= size
            receive_R[move.dst_rank] -= size
        yield sorted(transfers)


def urgency_of(moves: list[Move], left: list[int], num_ranks: int) -> list[int]:
    send_R, receive_R = [0] * num_ranks, [0] * num_ranks
    for move, num_bytes in zip(moves, left, strict=True):
        send_R[move.src_rank] += num_bytes
        receive_R[move.dst_rank] += num_bytes
    return [max(send_R[move.src_rank], receive_R[move.dst_rank]) for move in moves]
