"""Migration: the moves that turn one placement into another, cut into batches and rounds.

A batch is what the staging memory holds at once; its layers are committed together when its last
round is done. A round is what may be on the links between two engine steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.planning.sources import choose_sources
from ep_rebalance.topology import Link, Topology

_CHUNK_BYTES = 256
"""An expert is cut at multiples of this, so that its parts stay aligned and none is tiny."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert of one layer on its way into a slot; slot numbers count over all ranks.

    staging: place in the destination rank's staging memory, from 0 in each batch.
    """

    layer: int
    expert: int
    src_rank: int
    src_slot: int
    dst_rank: int
    dst_slot: int
    link: Link
    staging: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bytes `start` to `stop` of the packed expert that `Batch.moves[move]` moves."""

    move: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One all-to-all; at most one transfer of each move."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Whole layers whose moves fit into the staging memory together."""

    layers: tuple[int, ...]
    moves: tuple[Move, ...]
    rounds: tuple[Round, ...]

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes over links of that kind; over all of them if None."""
        return sum(
            transfer.stop - transfer.start
            for one_round in self.rounds
            for transfer in one_round.transfers
            if link in (None, self.moves[transfer.move].link)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """The way from `source` to `target`; a layer whose quotas alone change is in no batch.

    quotas_LP: float64 [L, P], the quotas to serve `target` with.
    """

    source: Placement
    target: Placement
    quotas_LP: NDArray[np.float64]
    batches: tuple[Batch, ...]

    @property
    def num_moves(self) -> int:
        return sum(len(batch.moves) for batch in self.batches)

    @property
    def num_rounds(self) -> int:
        return sum(len(batch.rounds) for batch in self.batches)

    @property
    def num_steps(self) -> int:
        """Engine steps that it takes: one for each round, and one for each batch's vote."""
        return self.num_rounds + len(self.batches)

    def num_bytes(self, link: Link | None = None) -> int:
        """Bytes over links of that kind; over all of them if None."""
        return sum(batch.num_bytes(link) for batch in self.batches)


def schedule(
    source: Placement,
    target: Placement,
    quotas_LP: NDArray[np.float64],
    *,
    topology: Topology,
    expert_bytes_L: Sequence[int],
    max_bytes_per_round: int,
    staging_slots: int,
) -> Migration:
    """Cut the difference of two placements into batches and rounds.

    expert_bytes_L: packed size of one expert of each layer.
    max_bytes_per_round: bound on what a rank sends, and on what it receives, in one round. A copy
        within a rank counts as both.
    staging_slots: experts that the staging memory of a rank holds.

    Raises ValueError if the sizes do not fit each other or a layer alone overflows the staging
    memory.
    """
    _check_sizes(source, target, topology, expert_bytes_L, max_bytes_per_round)
    batches = []
    for layers in _batch_layers(_arrivals_LR(source, target), staging_slots):
        moves = _stage_moves(source, target, layers, topology, expert_bytes_L)
        rounds = tuple(_fill_rounds(moves, expert_bytes_L, source.num_ranks, max_bytes_per_round))
        batches.append(Batch(layers=layers, moves=moves, rounds=rounds))
    return Migration(source=source, target=target, quotas_LP=quotas_LP, batches=tuple(batches))


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
    """Consecutive layers with moves, as many as every rank's staging memory holds at once."""
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
    expert_bytes_L: Sequence[int],
) -> tuple[Move, ...]:
    fetches = choose_sources(
        source, target, layers=layers, topology=topology, expert_bytes_L=expert_bytes_L
    )
    staged_R = [0] * source.num_ranks
    moves = []
    for fetch in fetches:
        moves.append(
            Move(
                layer=fetch.layer,
                expert=fetch.expert,
                src_rank=fetch.src_rank,
                src_slot=fetch.src_slot,
                dst_rank=fetch.dst_rank,
                dst_slot=fetch.dst_slot,
                link=fetch.link,
                staging=staged_R[fetch.dst_rank],
            )
        )
        staged_R[fetch.dst_rank] += 1
    return tuple(moves)


def _fill_rounds(
    moves: tuple[Move, ...], expert_bytes_L: Sequence[int], num_ranks: int, max_bytes: int
) -> Iterator[Round]:
    """Rounds filled greedily: the moves at the ranks with most left to send or receive come first."""
    left = [expert_bytes_L[move.layer] for move in moves]
    while any(left):
        urgency = _urgency(moves, left, num_ranks)
        order = sorted((i for i in range(len(moves)) if left[i]), key=lambda i: (-urgency[i], i))
        transfers = _fill_round(moves, left, order, expert_bytes_L, num_ranks, max_bytes)
        yield Round(transfers=tuple(sorted(transfers, key=lambda transfer: transfer.move)))


def _urgency(moves: tuple[Move, ...], left: list[int], num_ranks: int) -> list[int]:
    """For each move, bytes left at the busier of its two ranks."""
    send_R, receive_R = [0] * num_ranks, [0] * num_ranks
    for move, num_bytes in zip(moves, left, strict=True):
        send_R[move.src_rank] += num_bytes
        receive_R[move.dst_rank] += num_bytes
    return [max(send_R[move.src_rank], receive_R[move.dst_rank]) for move in moves]


def _fill_round(
    moves: tuple[Move, ...],
    left: list[int],
    order: list[int],
    expert_bytes_L: Sequence[int],
    num_ranks: int,
    max_bytes: int,
) -> Iterator[Transfer]:
    """The transfers of one round; takes their bytes off `left`."""
    send_R, receive_R = [max_bytes] * num_ranks, [max_bytes] * num_ranks
    chunk = min(_CHUNK_BYTES, max_bytes)
    for index in order:
        move = moves[index]
        room = min(send_R[move.src_rank], receive_R[move.dst_rank])
        size = left[index] if left[index] <= room else room // chunk * chunk
        if not size:
            continue
        start = expert_bytes_L[move.layer] - left[index]
        yield Transfer(move=index, start=start, stop=start + size)
        left[index] -= size
        send_R[move.src_rank] -= size
        receive_R[move.dst_rank] -= size
