"""Sizes: groups of replays that can be compared, with the same ranks and redundant experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.words import counted
from ep_rebalance.offline.run import Replayed


@dataclass(frozen=True, slots=True)
class Size:
    """Replays with the same ranks and redundant experts.

    moe_layers: the numbers of the layers in the engine's model.
    bytes_known: whether the size of an expert is known.
    results: the replays, in the order in which they were asked for.
    """

    ranks: int
    redundant: int
    moe_layers: list[int]
    bytes_known: bool
    results: tuple[Replayed, ...]

    @property
    def label(self) -> str:
        return f"EP{self.ranks}, {counted(self.redundant, 'redundant expert')}"

    @property
    def planned(self) -> tuple[Replayed, ...]:
        """The replays whose moves are counted."""
        return tuple(one for one in self.results if REPLAY_POLICIES[one.scenario.policy].moves)

    @property
    def extremes(self) -> tuple[Replayed, ...]:
        """Before and after: `none` or else the first, and `ours` or else the last. One if these coincide."""
        before = self.first("none") or self.results[0]
        after = self.first("ours")
        if after is None or after is before:
            after = self.results[-1]
        return (before,) if after is before else (before, after)

    def first(self, *policies: str) -> Replayed | None:
        """The replay of the first of these policies that was replayed; None if none was."""
        by_policy = {one.scenario.policy: one for one in self.results}
        return next((by_policy[policy] for policy in policies if policy in by_policy), None)

    def saved(self, one: Replayed) -> float | None:
        """Fraction of the step time that a replay saves compared with policy `none`; None without that."""
        baseline = self.first("none")
        return None if baseline is None else 1 - one.mean_step_seconds / baseline.mean_step_seconds


def by_size(head: TraceHead, replayed: Sequence[Replayed]) -> list[Size]:
    """Replays grouped by size, in the order in which sizes first occur."""
    results: dict[tuple[int, int], list[Replayed]] = {}
    for one in replayed:
        scenario = one.scenario
        key = (scenario.topology.num_ranks, scenario.config.planner.redundant_experts)
        results.setdefault(key, []).append(one)
    numbers, known = head.layer_numbers, all(head.expert_bytes)
    return [Size(*key, numbers, known, tuple(same)) for key, same in results.items()]
