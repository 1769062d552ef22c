"""What follows from the choice of a policy: its planner, its staging memory, and how a plan is made."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name

import numpy as np

from ep_rebalance.config import PlannerConfig
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, mean_imbalance_L
from ep_rebalance.planning.incremental.planner import MANY_PAIRS
from ep_rebalance.planning.problem import Budget, Plan, Planner, Problem
from ep_rebalance.policies import POLICIES
from ep_rebalance.topology import Topology


def keep_current(problem: Problem) -> Placement:
    """The policy `none`: quotas may follow the load, experts stay."""
    return problem.current


def planner_of(name: str) -> Planner:
    """The planner of a policy, imported on demand.

    Raises ImportError if a package that it needs is missing.
    """
    planner: Planner = resolve_name(POLICIES[name].planner)
    return planner


def own_planners() -> dict[str, Planner]:
    """The planners that need no other package, by the name of their policy."""
    return {name: planner_of(name) for name, policy in POLICIES.items() if not policy.needs}


def staging_slots(
    settings: PlannerConfig,
    max_staging_bytes: int,
    slots_per_rank: int,
    expert_bytes_L: Sequence[int],
) -> int:
    """How many experts the staging memory holds: as many as `max_staging_bytes` allow and a migration can
    use, but at least the arrivals of one layer, which are all slots of a rank if the policy does not bound
    its arrivals.

    expert_bytes_L: L sizes, bytes. One packed expert of each layer.
    """
    of_a_layer = slots_per_rank
    if POLICIES[settings.policy].bounded_arrivals:
        of_a_layer = min(settings.max_arrivals_per_rank_and_layer, slots_per_rank)
    allowed = max_staging_bytes // max(expert_bytes_L)
    return max(of_a_layer, min(allowed, of_a_layer * len(expert_bytes_L)))


def make_plan(planner: Planner, problem: Problem) -> Plan:
    """Run the planner and predict what its placement does on the same window.

    Both imbalances use quotas fitted to the window's total, so that their difference is what moving
    experts adds. They are means over the samples, in which load varies while quotas stay; still,
    both are optimistic about load to come.
    """
    target = planner(problem)
    quotas_LP = problem.cost.split(problem.load, target)
    after_L = mean_imbalance_L(problem.cost, problem.load, target, quotas_LP)
    before_L, unmoved_LP = after_L, quotas_LP
    if target != problem.current:
        unmoved_LP = problem.cost.split(problem.load, problem.current)
        before_L = mean_imbalance_L(problem.cost, problem.load, problem.current, unmoved_LP)
    return Plan(
        placement=target,
        quotas_LP=quotas_LP,
        unmoved_quotas_LP=unmoved_LP,
        imbalance_before_L=before_L,
        imbalance_after_L=after_L,
        moved_slots=target.changed_slots(problem.current),
    )


def compile_planner() -> None:
    """Compile all planning code, so that nothing is compiled while the engine serves.

    This takes seconds the first time on a machine; later starts load the cached code.
    """
    for num_ranks, num_experts in ((2, 8), (MANY_PAIRS, 2 * MANY_PAIRS - 2)):
        counts = np.arange(1, 3 * num_experts + 1, dtype=np.float64)
        tokens_WLE = counts.reshape(3, 1, num_experts) ** 2
        problem = Problem(
            load=WindowLoad(tokens_WLE=tokens_WLE, weight_W=np.ones(3), steps_W=np.ones(3)),
            current=Placement.contiguous(
                num_layers=1, num_experts=num_experts, num_ranks=num_ranks, num_redundant=2
            ),
            topology=Topology.single_node(num_ranks),
            budget=Budget(max_moved_slots=10, max_arrivals=5),
        )
        for planner in own_planners().values():
            make_plan(planner, problem)
    RooflineCost(reading=100.0).split(problem.load, problem.current)
