"""Sizes: groups of replays that can be compared, with the same ranks and redundant experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.gain import Gain
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.words import counted
from ep_rebalance.offline.run import Replayed


@dataclass(frozen=True, slots=True)
class Size:
    """Replays with the same ranks and redundant experts.

    experts: logical experts of a layer.
    moe_layers: the numbers of the layers in the engine's model.
    layer_bytes: one expert of each layer, all layers together; 0 if the size of an expert is not known.
    results: the replays, in the order in which they were asked for.
    """

    ranks: int
    redundant: int
    experts: int
    moe_layers: list[int]
    layer_bytes: int
    results: tuple[Replayed, ...]

    @property
    def label(self) -> str:
        return f"EP{self.ranks}, {counted(self.redundant, 'redundant expert')}"

    @property
    def bytes_known(self) -> bool:
        return self.layer_bytes > 0

    @property
    def redundant_bytes(self) -> int | None:
        """What the redundant experts take on each rank; None if the size of an expert is not known."""
        return self.redundant * self.layer_bytes // self.ranks if self.bytes_known else None

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

    def gain(self, one: Replayed) -> Gain | None:
        """What a replay saves compared with policy `none`; None without that."""
        baseline = self.first("none")
        return None if baseline is None else Gain.of(one, baseline)


def by_size(head: TraceHead, replayed: Sequence[Replayed]) -> list[Size]:
    """Replays grouped by size, in the order in which sizes first occur."""
    results: dict[tuple[int, int], list[Replayed]] = {}
    for one in replayed:
        scenario = one.scenario
        key = (scenario.topology.num_ranks, scenario.config.planner.redundant_experts)
        results.setdefault(key, []).append(one)
    known = sum(head.expert_bytes) if all(head.expert_bytes) else 0
    return [
        Size(*key, head.experts, head.layer_numbers, known, tuple(same))
        for key, same in results.items()
    ]
