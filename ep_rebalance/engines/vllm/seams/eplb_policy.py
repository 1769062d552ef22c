"""vLLM's own placement policy: as a planner to compare with (`planner.policy: vllm`), and as its balancer
calls it, for `ep-rebalance replay --policy vllm-eplb`.

Target: `DefaultEplbPolicy.rebalance_experts` (vllm/distributed/eplb/policy/default.py). It starts from
scratch each time and may put two replicas of an expert on one rank. The planner, called as for a model
without expert groups, spreads these, which can only improve its balance.
"""

from __future__ import annotations

import numpy as np
import torch
import vllm  # noqa: F401 - so that the policy is refused at start, not in each plan, if it is missing
from numpy.typing import NDArray

from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.placement import Placement
from ep_rebalance.planning.alignment import align
from ep_rebalance.planning.incremental.spreading import spread_replicas
from ep_rebalance.planning.problem import Planner, Problem

_POLICY = "vllm.distributed.eplb.policy:DefaultEplbPolicy"
_OLD_MAP = "old_global_expert_indices"

CONTRACTS = (
    Contract(
        f"{_POLICY}.rebalance_experts",
        ("weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", _OLD_MAP),
    ),
)


def plan_vllm(problem: Problem) -> Placement:
    """Ignores nodes, budget and cost model. A layer without load stays as it is."""
    # One group does not divide by two nodes or more, which is how the policy is told to ignore nodes.
    return _plan(problem, groups=1, nodes=max(problem.topology.num_nodes, 2))


def hierarchical_planner(groups: int) -> Planner:
    """The policy's branch for models whose router picks groups of experts first, as DeepSeek's does."""

    def plan(problem: Problem) -> Placement:
        return _plan(problem, groups=groups, nodes=problem.topology.num_nodes)

    return plan


def rebalance_experts(
    load_LE: NDArray[np.int64] | NDArray[np.float64],
    slots_LP: NDArray[np.int32],
    *,
    groups: int,
    nodes: int,
    ranks: int,
) -> NDArray[np.int64]:
    """int64 [L, P], what the policy makes of a load, as `EplbState.rearrange` calls it. A rank may hold an
    expert twice.

    load_LE: [L, E], tokens of each logical expert.
    slots_LP: int32 [L, P]. The expert in each slot so far; what stays on its rank stays in its slot.
    groups: expert groups. Packed onto nodes if their numbers divide; otherwise nodes are ignored.
    """
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    found: NDArray[np.int64] = DefaultEplbPolicy.rebalance_experts(
        torch.from_numpy(load_LE),
        slots_LP.shape[1],
        groups,
        nodes,
        ranks,
        torch.from_numpy(slots_LP.astype(np.int64)),
    ).numpy()
    return found


def _plan(problem: Problem, *, groups: int, nodes: int) -> Placement:
    """What the policy packed onto a node stays there when replicas are spread. A layer stays as it is without
    load, and if an expert would have more replicas than there may be.
    """
    current, load_LE = problem.current, problem.load.load_LE
    slots_LP = rebalance_experts(
        load_LE, current.slots_LP, groups=groups, nodes=nodes, ranks=current.num_ranks
    )
    parts = nodes if groups % nodes == 0 else 1
    for layer, load_E in enumerate(load_LE):
        if load_E.any():
            for slots_P in np.split(slots_LP[layer], parts):
                spread_replicas(slots_P, load_E, current.num_ranks // parts)
        if not load_E.any() or np.bincount(slots_LP[layer]).max() > current.max_replicas:
            slots_LP[layer] = current.slots_LP[layer]
    aligned_LP = align(slots_LP.astype(np.int32), current.slots_LP, current.num_ranks)
    return Placement(aligned_LP, current.num_experts, current.num_ranks)
