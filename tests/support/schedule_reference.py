"""The schedule as it reads in plain Python, one object for each transfer: what the compiled one must
give to the last byte.
"""

from collections.abc import Sequence

import numpy as np

from ep_rebalance.migration import Migration, Move
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
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
    pace: Pace,
    staging_slots: int,
) -> list[PlainBatch]:
    """Batches whose transfers count the moves of all batches together."""
    layers = layers_in_order(source, target, pace)
    moves = stage_moves(source, target, layers, topology, expert_bytes_L, staging_slots)
    sizes = [expert_bytes_L[move.layer] for move in moves]
    batches: list[PlainBatch] = []
    left, done, rounds = list(sizes), [], []
    while len(done) < len(layers):
        rounds.append(fill_round(moves, sizes, left, done, layers, pace, staging_slots))
        whole = []
        for layer in layers[len(done) :]:
            if any(left[i] for i, move in enumerate(moves) if move.layer == layer):
                break
            whole.append(layer)
        if whole:
            done += whole
            batches.append((tuple(whole), [m for m in moves if m.layer in whole], rounds))
            rounds = []
    return batches


def layers_in_order(source: Placement, target: Placement, pace: Pace) -> list[int]:
    changed = np.flatnonzero((source.slots_LP != target.slots_LP).any(axis=1)).tolist()
    first = [layer for layer in pace.layers if layer in changed]
    return first + [layer for layer in changed if layer not in first]


def stage_moves(source, target, layers, topology, expert_bytes_L, staging_slots) -> list[Move]:
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
                staging=staged_R[dst_rank] % staging_slots,
            )
            if move.link != "local":
                sent_bytes_R[src_rank] += expert_bytes_L[layer]
            staged_R[dst_rank] += 1
            moves.append(move)
    return moves


def rank_of(placement: Placement, slot: int) -> int:
    return slot // placement.slots_per_rank


def fill_round(
    moves: list[Move],
    sizes: list[int],
    left: list[int],
    done: list[int],
    layers: list[int],
    pace: Pace,
    staging_slots: int,
) -> list[Transfer]:
    """The transfers of the next round, whose bytes are taken off `left`.

    done: layers that are committed, so that their places in the staging memory are free.
    """
    ranks = range(1 + max(max(move.src_rank, move.dst_rank) for move in moves))
    waiting = [i for i, move in enumerate(moves) if move.layer not in done]
    moving = [
        i
        for rank in ranks
        for i in [i for i in waiting if moves[i].dst_rank == rank][:staging_slots]
    ]
    urgency = urgency_of(moves, left, len(ranks))
    order = sorted((i for i in moving if left[i]), key=lambda i: (-urgency[i], i))
    far_most = min(pace.max_internode_bytes, pace.max_bytes)
    send_R, receive_R = [pace.max_bytes] * len(ranks), [pace.max_bytes] * len(ranks)
    far_send_R, far_receive_R = [far_most] * len(ranks), [far_most] * len(ranks)
    chunk, transfers = min(CHUNK_BYTES, far_most), []
    for index in order:
        move = moves[index]
        room = min(send_R[move.src_rank], receive_R[move.dst_rank])
        if move.link == "internode":
            room = min(room, far_send_R[move.src_rank], far_receive_R[move.dst_rank])
        size = left[index] if left[index] <= room else room // chunk * chunk
        if not size:
            continue
        start = sizes[index] - left[index]
        transfers.append((index, start, start + size))
        left[index] -= size
        send_R[move.src_rank] -= size
        receive_R[move.dst_rank] -= size
        if move.link == "internode":
            far_send_R[move.src_rank] -= size
            far_receive_R[move.dst_rank] -= size
    return sorted(transfers)


def urgency_of(moves: list[Move], left: list[int], num_ranks: int) -> list[int]:
    send_R, receive_R = [0] * num_ranks, [0] * num_ranks
    for move, num_bytes in zip(moves, left, strict=True):
        send_R[move.src_rank] += num_bytes
        receive_R[move.dst_rank] += num_bytes
    return [max(send_R[move.src_rank], receive_R[move.dst_rank]) for move in moves]
