"""What a placement policy does on the steps that follow those it has seen."""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from planning_cases import Case
from planning_policies import Policy, Steps

from ep_rebalance.load.window import LoadSample
from ep_rebalance.offline.scoring import (
    Moves,
    balancedness,
    best_split_balancedness,
    cross_node_tokens,
    moves_between,
    score_own_counts,
)
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology

WINDOW_STEPS, SNAPSHOT_STEPS = 48, 6
STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one policy did in one repetition; means over the windows that follow the first."""

    case: Case
    policy: str
    seed: int
    even: float
    quotas: float
    own_counts: float
    best_split: float | None
    cross_node_tokens: float
    plans: int = 0
    moved: float = 0.0
    gigabytes: float = 0.0
    busiest_gigabytes: float = 0.0
    serial: float = 0.0
    cross_node_moves: float = 0.0
    milliseconds: float | None = None
    quota_microseconds: float = 0.0


@dataclass(slots=True)
class _Scores:
    """Of each window or snapshot."""

    even: list[float] = field(default_factory=list)
    quotas: list[float] = field(default_factory=list)
    own_counts: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    crossing: list[float] = field(default_factory=list)


def score_policy(
    policy: Policy,
    case: Case,
    seed: int,
    windows: Sequence[Steps],
    topology: Topology,
    *,
    best_split: bool,
) -> Row:
    """Let the policy serve all windows, and score it on all but the first.

    best_split: whether to find it, which takes most of the time.
    """
    bytes_L = [case.model.expert_bytes] * case.model.layers
    scores, moves = _Scores(), []
    for number, window_NLE in enumerate(windows):
        policy.window_begins(window_NLE)
        if number:
            scores.even.append(balancedness(window_NLE, policy.placement))
            if best_split:
                scores.best.append(best_split_balancedness(window_NLE, policy.placement))
        samples = []
        parts = np.split(window_NLE, WINDOW_STEPS // SNAPSHOT_STEPS)
        for index, part_NLE in enumerate(parts):
            if number:
                _score_snapshot(scores, policy, part_NLE, topology)
            if number and index == number % len(parts):
                scores.own_counts.append(_by_own_counts(policy, part_NLE, topology, number))
            samples.append(snapshot_of(part_NLE))
            policy.snapshot(samples[-1])
        before = policy.placement
        policy.window_ends(samples)
        if 0 < number < len(windows) - 1 and policy.moves:
            moves.append(moves_between(before, policy.placement, topology, bytes_L))
    return _row(policy, case, seed, scores, moves, last_NLE=windows[-1])


def _by_own_counts(policy: Policy, part_NLE: Steps, topology: Topology, seed: int) -> float:
    """Of the snapshot's first step alone, since every source has to be poured."""
    split = score_own_counts(
        part_NLE[:1],
        policy.placement,
        policy.quotas_LP,
        topology,
        load_LE=policy.load_LE,
        seed=seed,
    )
    return split.balancedness


def _score_snapshot(scores: _Scores, policy: Policy, part_NLE: Steps, topology: Topology) -> None:
    placement, quotas_LP = policy.placement, policy.quotas_LP
    scores.quotas.append(balancedness(part_NLE, placement, quotas_LP))
    scores.crossing.append(cross_node_tokens(part_NLE, placement, quotas_LP, topology))


def _row(
    policy: Policy, case: Case, seed: int, scores: _Scores, moves: Sequence[Moves], last_NLE: Steps
) -> Row:
    made = [move for move in moves if move.slots]
    return Row(
        case=case,
        policy=policy.name,
        seed=seed,
        even=_mean(scores.even),
        quotas=_mean(scores.quotas),
        own_counts=_mean(scores.own_counts),
        best_split=_mean(scores.best) if scores.best else None,
        plans=len(made),
        moved=_mean(move.fraction for move in moves),
        gigabytes=_mean(move.bytes / 1e9 for move in moves),
        busiest_gigabytes=_mean(move.busiest_rank_bytes / 1e9 for move in moves),
        serial=_mean(move.serial_transfers for move in made),
        cross_node_moves=_mean(move.cross_node for move in made),
        cross_node_tokens=_mean(scores.crossing),
        milliseconds=float(np.median(policy.milliseconds[1:])) if policy.milliseconds[1:] else None,
        quota_microseconds=_quota_microseconds(policy.placement, last_NLE.sum(axis=0)),
    )


def _quota_microseconds(placement: Placement, load_LE: Steps) -> float:
    """For each layer, the median of several times."""
    seconds = timeit.repeat(lambda: split_quotas(placement, load_LE), number=1, repeat=11)
    return 1e6 * float(np.median(seconds)) / placement.num_layers


def snapshot_of(steps_NLE: Steps) -> LoadSample:
    counts_LE = steps_NLE.sum(axis=0)
    return LoadSample(
        counts_ALE=np.stack([np.zeros_like(counts_LE), counts_LE]),
        steps=len(steps_NLE),
        step_seconds=STEP_SECONDS,
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0
