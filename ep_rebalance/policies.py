"""Policies: who decides where experts move (`planner.policy`).

An entry is all there is to know about a policy: settings, staging memory, offline tools and their texts
follow from it. This module is a layer below the settings, so an entry names its planner and does not
import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Line:
    """How a policy is drawn in reports.

    colour: in CSS, with `light-dark(...)` if one colour does not stand out from both backgrounds.
    dashes: pixels. Lengths of dashes and gaps, () for a solid line. They distinguish lines for readers
        who cannot distinguish the colours.
    width: pixels.
    """

    colour: str
    dashes: tuple[int, ...] = ()
    width: float = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to plan.

    name: what `planner.policy` calls it.
    summary: what it does, a clause without a semicolon.
    planner: `module:function`. A `planning.problem.Planner`.
    line: how reports draw it.
    bounded_arrivals: whether its plans keep to `Budget.max_arrivals`; staging memory is smaller then.
    needs: a package that the planner needs and ep_rebalance does not, or "".
    """

    name: str
    summary: str
    planner: str
    line: Line
    bounded_arrivals: bool = False
    needs: str = ""


_ENTRIES = (
    Policy(
        name="incremental",
        summary="improves the placement that is served, within the budget",
        planner="ep_rebalance.planning.incremental.planner:plan_incremental",
        bounded_arrivals=True,
        line=Line("#0072b2", width=3),
    ),
    Policy(
        name="greedy",
        summary="the published DeepSeek EPLB algorithm, which starts anew each time",
        planner="ep_rebalance.planning.greedy:plan_greedy",
        line=Line("light-dark(#c28500, #e69f00)", (10, 3)),
    ),
    Policy(
        name="vllm",
        summary="the installed vLLM's planner (not its balancer), which starts anew each time",
        planner="ep_rebalance.engines.vllm.seams.eplb_policy:plan_vllm",
        needs="vLLM",
        line=Line("#d55e00", (5, 3)),
    ),
    Policy(
        name="none",
        summary="never plans",
        planner="ep_rebalance.planning.policies:keep_current",
        line=Line("light-dark(#000000, #d9d9d9)", width=1.5),
    ),
)

POLICIES: Mapping[str, Policy] = MappingProxyType({policy.name: policy for policy in _ENTRIES})
