"""Policies: the planners by name, and the one way to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import Policy
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.greedy import plan_greedy
from ep_rebalance.planning.incremental import plan_incremental
from ep_rebalance.planning.plan import Budget, Plan, Planner
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology


def keep_current(
    samples_WLE: NDArray[np.float64],
    current: Placement,
    topology: Topology,
    budget: Budget,
    seed: int,
) -> Placement:
    """The policy `none`: quotas may follow the load, experts stay."""
    return current


PLANNERS: Mapping[Policy, Planner] = MappingProxyType(
    {"incremental": plan_incremental, "greedy": plan_greedy, "none": keep_current}
)


def make_plan(
    policy: Policy,
    samples_WLE: NDArray[np.float64],
    current: Placement,
    topology: Topology,
    budget: Budget,
    seed: int,
) -> Plan:
    """Run the planner and predict what its placement does on the same window.

    samples_WLE: float64 [W, L, E], tokens per logical expert in each snapshot, oldest first.

    Both imbalances use quotas fitted to the window's total, so that their difference is what moving
    adds; the mean over snapshots sees the load vary under fixed quotas, but both are optimistic
    about load to come.
    """
    load_LE = samples_WLE.sum(axis=0)
    target = PLANNERS[policy](samples_WLE, current, topology, budget, seed)
    quotas_LP = split_quotas(target, load_LE)
    return Plan(
        placement=target,
        quotas_LP=quotas_LP,
        imbalance_before_L=mean_imbalance_L(samples_WLE, current, split_quotas(current, load_LE)),
        imbalance_after_L=mean_imbalance_L(samples_WLE, target, quotas_LP),
        moved_slots=target.changed_slots(current),
    )


def mean_imbalance_L(
    samples_WLE: NDArray[np.float64], placement: Placement, quotas_LP: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [L], max/mean rank load of each snapshot, averaged over the snapshots."""
    samples = [imbalance_L(placement.rank_load_LR(load_LE, quotas_LP)) for load_LE in samples_WLE]
    mean_L: NDArray[np.float64] = np.mean(samples, axis=0)
    return mean_L


def compile_planner() -> None:
    """Compile all of the planning, so that none of it is compiled while the engine serves.

    Takes seconds the first time on a machine; later starts load the cached code.
    """
    samples_WLE = np.arange(1, 25, dtype=np.float64).reshape(3, 1, 8) ** 2
    current = Placement.contiguous(num_layers=1, num_experts=8, num_ranks=2, num_redundant=2)
    budget = Budget(max_moved_slots=10, max_arrivals=5)
    for policy in PLANNERS:
        make_plan(policy, samples_WLE, current, Topology.single_node(2), budget, 0)
