"""Pace: how many bytes of a migration each step carries, and which layers come first.

All of a migration's bytes take as long at any pace. A slow one lengthens each step by less, a fast one lets
the plan pay sooner. So usually a step is lengthened by USUAL_SHARE, and by as much as the plan is predicted
to shorten it, up to MOST_SHARE, if that is more.

Letter of this module: `F` fetches; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import MigrationConfig
from ep_rebalance.placement import Placement
from ep_rebalance.planning.problem import Plan
from ep_rebalance.planning.sources import Fetches, choose_sources
from ep_rebalance.topology import LINKS, Link, Topology

USUAL_SHARE = 0.01
"""Fraction of a step's time for which links may be busy with experts."""
MOST_SHARE = 0.05
"""The same for a plan that saves as much. Such a gain also means that the next plan will not be small."""
LEAST_BYTES = 1 << 20
"""Fewer bytes than this take hardly less time, since a round has a cost of its own."""
MOST_EXPERTS = 2
"""More bytes than these experts of the largest layer do not make the next commit much earlier, and buffers
are reserved for all that a step may carry.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a migration goes. All ranks must have the same.

    max_bytes: bytes. The most that a rank sends, and that it receives, in one step.
    max_internode_bytes: bytes. The most of these that go over links between nodes.
    layers: those that are committed first, in this order; others follow by number.
    hurried: whether the plan saves MOST_SHARE or more, so that another is made as soon as it is served.
    """

    max_bytes: int
    max_internode_bytes: int
    layers: tuple[int, ...] = ()
    hurried: bool = False

    @classmethod
    def of_bytes(cls, max_bytes: int) -> Pace:
        """The same bound for all links, and layers by number."""
        return cls(max_bytes=max_bytes, max_internode_bytes=max_bytes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transport:
    """What a migration goes over.

    expert_bytes_L: L sizes, bytes. One expert of each layer.
    step_seconds: seconds. Median time of an engine step; 0 if unknown.
    """

    settings: MigrationConfig
    topology: Topology
    expert_bytes_L: Sequence[int]
    step_seconds: float

    def pace(self, plan: Plan, current: Placement, gain: float) -> Pace:
        """How the migration from `current` to `plan` goes.

        gain: fraction of the step time that it is predicted to save.
        """
        share = min(max(USUAL_SHARE, gain), MOST_SHARE)  # the usual one if `gain` is not a number
        return Pace(
            max_bytes=self._bytes_per_step("intranode", share),
            max_internode_bytes=self._bytes_per_step("internode", share),
            layers=layers_by_gain(plan, current, self.expert_bytes_L),
            hurried=gain >= MOST_SHARE,
        )

    def cost(self, target: Placement, current: Placement, pace: Pace) -> tuple[int, float]:
        """(steps, seconds) that the busiest rank needs: for its bytes, and a round in each step."""
        fetches = choose_sources(
            current,
            target,
            layers=range(current.num_layers),
            topology=self.topology,
            expert_bytes_L=self.expert_bytes_L,
        )
        bytes_F = np.array(self.expert_bytes_L)[fetches.layer]
        seconds_F = bytes_F / np.array(self.topology.bytes_per_second)[fetches.link]
        far_F = bytes_F * fetches.over("internode")
        steps = max(
            _busiest(fetches, bytes_F, current.num_ranks) / pace.max_bytes,
            _busiest(fetches, far_F, current.num_ranks) / pace.max_internode_bytes,
        )
        rounds = int(np.ceil(steps))
        seconds = _busiest(fetches, seconds_F, current.num_ranks)
        return rounds, rounds * self.topology.round_seconds + seconds

    def _bytes_per_step(self, link: Link, share: float) -> int:
        setting = self.settings.max_bytes_per_step
        if setting != "auto":
            return setting
        fitting = share * self.step_seconds * self.topology.bytes_per_second[LINKS.index(link)]
        most = most_bytes_per_step(setting, self.expert_bytes_L)
        return max(round(min(fitting, most)), LEAST_BYTES)


def most_bytes_per_step(setting: int | str, expert_bytes_L: Sequence[int]) -> int:
    """The most bytes that a rank ever sends in a step: what buffers are reserved for.

    setting: of `migration.max_bytes_per_step`.
    expert_bytes_L: L sizes, bytes. One expert of each layer.
    """
    if isinstance(setting, int):
        return setting
    return max(LEAST_BYTES, MOST_EXPERTS * max(expert_bytes_L))


def layers_by_gain(
    plan: Plan, current: Placement, expert_bytes_L: Sequence[int]
) -> tuple[int, ...]:
    """The layers in which the plan moves experts, first those that save most for each byte."""
    bytes_L = moved_bytes_L(plan.placement, current, expert_bytes_L)
    moved = np.flatnonzero(bytes_L)
    gain_L = plan.imbalance_before_L - plan.imbalance_after_L
    order = np.argsort(-gain_L[moved] / bytes_L[moved], kind="stable")
    layers: tuple[int, ...] = tuple(moved[order].tolist())
    return layers


def moved_bytes_L(
    target: Placement, current: Placement, expert_bytes_L: Sequence[int]
) -> NDArray[np.int64]:
    """int64 [L], bytes of the experts that change their slot."""
    moves_L = (target.slots_LP != current.slots_LP).sum(axis=1)
    bytes_L: NDArray[np.int64] = moves_L * np.array(expert_bytes_L, dtype=np.int64)
    return bytes_L


def _busiest(fetches: Fetches, value_F: NDArray[np.generic], ranks: int) -> float:
    """The largest sum over what a rank sends, or over what it receives; a copy within it is received."""
    sent_F = ~fetches.over("local")
    receiving_R = np.bincount(fetches.dst_rank, value_F, minlength=ranks)
    sending_R = np.bincount(fetches.src_rank[sent_F], value_F[sent_F], minlength=ranks)
    return float(max(sending_R.max(), receiving_R.max()))
