"""Active replicas: where a step mostly reads weights, all tokens of an expert go to one of its replicas.

An expert is read once for each of its replicas that gets tokens, however few these are. While reading
takes longer than computing, even tokens are no gain, and each further active replica is a loss (METRO,
arXiv 2512.09277). The active replicas are chosen so that the rank whose step takes longest takes as short
as possible: first one by one, hottest experts first, then by chains of changes that lead away from that
rank. A layer in which an even split of the tokens is quicker keeps it.

Times are in tokens: those that could be computed meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.placement import Placement

Tokens = TypeVar("Tokens", float, NDArray[np.float64])

_DEVIATIONS = 2.0
"""A step's tokens on the busiest rank are taken to be so many standard deviations (Poisson) above those of a
mean step. Reading hardly varies.
"""


class _Ranks(NamedTuple):
    """What each rank has to do in a step.

    tokens_R: float64 [R].
    reads_R: float64 [R], experts. How many it reads on average.
    """

    tokens_R: NDArray[np.float64]
    reads_R: NDArray[np.float64]


class _Replicas(NamedTuple):
    """Where experts are.

    slots_EC: int64 [E, C]. The slots of each expert, in the first `count_E` columns.
    count_E: int64 [E].
    slots_per_rank: slots.
    """

    slots_EC: NDArray[np.int64]
    count_E: NDArray[np.int64]
    slots_per_rank: int


def concentrate(
    placement: Placement,
    tokens_LE: NDArray[np.float64],
    reading: float,
    quotas_LP: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [L, P], `quotas_LP` with one active replica of each expert in the layers that gain by it.

    tokens_LE: float64 [L, E], tokens of a mean step.
    reading: tokens. How many could be computed while an expert is read.
    """
    chosen_LP = np.array(quotas_LP, dtype=np.float64)
    if placement.num_redundant:
        slots_LP = np.array(placement.slots_LP)
        for tokens_E, slots_P, chosen_P in zip(tokens_LE, slots_LP, chosen_LP, strict=True):
            _concentrate(tokens_E, slots_P, placement.num_ranks, reading, chosen_P)
    return chosen_LP


@compiled
def _concentrate(
    tokens_E: NDArray[np.float64],
    slots_P: NDArray[np.int32],
    num_ranks: int,
    reading: float,
    quotas_P: NDArray[np.float64],
) -> None:
    replicas = _replicas(slots_P, tokens_E.size, num_ranks)
    split = _Ranks(np.zeros(num_ranks), np.zeros(num_ranks))
    for slot in range(slots_P.size):
        rank, tokens = slot // replicas.slots_per_rank, tokens_E[slots_P[slot]] * quotas_P[slot]
        split.tokens_R[rank] += tokens
        split.reads_R[rank] += _read(tokens)
    one = _Ranks(np.zeros(num_ranks), np.zeros(num_ranks))
    active_E = _choose(tokens_E, replicas, reading, one)
    for _ in range(slots_P.size):
        if not _relieve(tokens_E, replicas, reading, one, active_E):
            break
    if _times(one, reading).max() < _times(split, reading).max():
        for slot in range(slots_P.size):
            quotas_P[slot] = 1.0 if active_E[slots_P[slot]] == slot else 0.0


@compiled
def _replicas(slots_P: NDArray[np.int32], num_experts: int, num_ranks: int) -> _Replicas:
    count_E = np.zeros(num_experts, np.int64)
    for expert in slots_P:
        count_E[expert] += 1
    slots_EC = np.zeros((num_experts, count_E.max()), np.int64)
    count_E[:] = 0
    for slot in range(slots_P.size):
        expert = slots_P[slot]
        slots_EC[expert, count_E[expert]] = slot
        count_E[expert] += 1
    return _Replicas(slots_EC, count_E, slots_P.size // num_ranks)


def read_part(tokens: Tokens) -> Tokens:
    """The fraction of steps in which an expert is read that gets so many tokens in a mean step (Poisson)."""
    # 1 - exp(-tokens)
    part: Tokens = 1.0 - np.exp(-tokens)
    return part


_read = compiled(read_part)


@compiled
def _time(tokens: float, reads: float, reading: float) -> float:
    time: float = max(tokens + _DEVIATIONS * np.sqrt(max(tokens, 0.0)), reading * reads)
    return time


@compiled
def _times(ranks: _Ranks, reading: float) -> NDArray[np.float64]:
    times_R = np.empty(ranks.tokens_R.size)
    for rank in range(times_R.size):
        times_R[rank] = _time(ranks.tokens_R[rank], ranks.reads_R[rank], reading)
    return times_R


@compiled
def _choose(
    tokens_E: NDArray[np.float64], replicas: _Replicas, reading: float, ranks: _Ranks
) -> NDArray[np.int64]:
    """int64 [E], a slot for each expert; its work is added to `ranks`.

    Experts without a choice come first, then the hottest; each goes where the rank is then done first.
    """
    slots_EC, count_E, slots_per_rank = replicas
    active_E = slots_EC[:, 0].copy()
    order = np.argsort(-tokens_E, kind="mergesort")
    for several in (False, True):
        for expert in order:
            if (count_E[expert] > 1) != several:
                continue
            tokens, least = tokens_E[expert], np.inf
            for slot in slots_EC[expert, : count_E[expert]]:
                rank = slot // slots_per_rank
                reads = ranks.reads_R[rank] + _read(tokens)
                time = _time(ranks.tokens_R[rank] + tokens, reads, reading)
                if time < least:
                    least, active_E[expert] = time, slot
            _add(ranks, active_E[expert] // slots_per_rank, tokens, 1.0)
    return active_E


@compiled
def _add(ranks: _Ranks, rank: int, tokens: float, sign: float) -> None:
    ranks.tokens_R[rank] += sign * tokens
    ranks.reads_R[rank] += sign * _read(tokens)


@compiled
def _relieve(
    tokens_E: NDArray[np.float64],
    replicas: _Replicas,
    reading: float,
    ranks: _Ranks,
    active_E: NDArray[np.int64],
) -> bool:
    """Take an expert from the rank that takes longest, along the shortest chain of ranks each of which passes
    one on, if then fewer ranks take so long and none longer; False if there is no such chain.
    """
    times_R = _times(ranks, reading)
    longest = times_R.max() * (1.0 - 1e-9)
    start = int(times_R.argmax())
    moved_R = np.full(times_R.size, -1)  # the expert that arrives on each rank of the chain
    chain = _search(tokens_E, replicas, reading, ranks, active_E, start, longest, moved_R)
    if chain < 0:
        return False
    before_E = active_E.copy()
    rank = chain
    while rank != start:
        expert = moved_R[rank]
        source = active_E[expert] // replicas.slots_per_rank
        for slot in replicas.slots_EC[expert, : replicas.count_E[expert]]:
            if slot // replicas.slots_per_rank == rank:
                active_E[expert] = slot
        _add(ranks, source, tokens_E[expert], -1.0)
        _add(ranks, rank, tokens_E[expert], 1.0)
        rank = source
    after_R = _times(ranks, reading)
    if after_R.max() <= times_R.max() and np.sum(after_R >= longest) < np.sum(times_R >= longest):
        return True
    for expert in range(active_E.size):
        if active_E[expert] != before_E[expert]:
            _add(ranks, active_E[expert] // replicas.slots_per_rank, tokens_E[expert], -1.0)
            _add(ranks, before_E[expert] // replicas.slots_per_rank, tokens_E[expert], 1.0)
    active_E[:] = before_E
    return False


@compiled
def _search(
    tokens_E: NDArray[np.float64],
    replicas: _Replicas,
    reading: float,
    ranks: _Ranks,
    active_E: NDArray[np.int64],
    start: int,
    longest: float,
    moved_R: NDArray[np.int64],
) -> int:
    """The end of the shortest chain from rank `start`: a rank that still takes less than `longest` with the
    expert that arrives there; -1 if there is none. Fills `moved_R`.
    """
    slots_EC, count_E, slots_per_rank = replicas
    waiting, head = [start], 0
    while head < len(waiting):
        here = waiting[head]
        head += 1
        for expert in range(active_E.size):
            if count_E[expert] < 2 or active_E[expert] // slots_per_rank != here:
                continue
            for slot in slots_EC[expert, : count_E[expert]]:
                rank = slot // slots_per_rank
                if rank == start or moved_R[rank] >= 0:
                    continue
                moved_R[rank] = expert
                waiting.append(rank)
                tokens = ranks.tokens_R[rank] + tokens_E[expert]
                reads = ranks.reads_R[rank] + _read(tokens_E[expert])
                if _time(tokens, reads, reading) < longest:
                    return int(rank)
    return -1
