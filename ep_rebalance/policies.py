"""Policies: who decides where experts move (`planner.policy`).

An entry is all that is known of a policy: settings, staging memory, offline tools and their texts follow
from it. This module is below the settings, so an entry names its planner and does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Line:
    """How a policy is drawn in reports.

    colour: in CSS, with `light-dark(...)` where one does not stand out from both backgrounds.
    dashes: lengths of dashes and gaps in pixels, none for a solid line. Who cannot tell two colours
    apart can tell these.
    """

    colour: str
    dashes: tuple[int, ...] = ()
    width: float = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to plan.

    name: in the settings. summary: what it does, a clause without a semicolon.
    planner: `module:function` of a `planning.problem.Planner`.
    bounded_arrivals: whether its plans keep to `Budget.max_arrivals`; staging memory can be smaller then.
    needs: a package that the planner needs and this one does not, "" if none.
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
        summary="the installed vLLM's own policy, which starts anew each time",
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
