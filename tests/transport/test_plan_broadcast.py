"""Plan broadcast: every rank reads the same bits of rank 0's plan."""

import numpy as np
import torch
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.collectives.plan_broadcast import QUOTA_UNIT, PlanBroadcast, read_plan
from ep_rebalance.placement import Placement
from ep_rebalance.planning.problem import Plan

PLACEMENT = Placement(np.array([[0, 1, 2, 1], [2, 0, 1, 0]]), 3, 2)
QUOTAS_LP = np.array([[1, 1 / 3, 1, 2 / 3], [1, 0.1, 1, 0.9]])


def plan_of(placement: Placement, quotas_LP) -> Plan:
    ones_L = np.ones(placement.num_layers)
    return Plan(
        placement=placement,
        quotas_LP=quotas_LP,
        unmoved_quotas_LP=quotas_LP,
        imbalance_before_L=ones_L,
        imbalance_after_L=ones_L,
        moved_slots=0,
    )


def broadcast(rank):
    """Rank 1 has a plan of its own, which nobody asked for."""
    plans = PlanBroadcast(
        group=dist.group.WORLD, shape=PLACEMENT.slots_LP.shape, device=torch.device("cpu")
    )
    plans.put(plan_of(PLACEMENT, QUOTAS_LP if rank == 0 else PLACEMENT.even_quotas_LP()))
    return read_plan(plans.begin().result().numpy())


def test_all_ranks_read_the_plan_of_rank_0(two_ranks: Ranks):
    answers = two_ranks.run(broadcast)
    for slots_LP, quotas_LP in answers:
        assert slots_LP.dtype == np.int32
        assert (slots_LP == PLACEMENT.slots_LP).all()
        assert np.abs(quotas_LP - QUOTAS_LP).max() <= 0.5 / QUOTA_UNIT
        assert (quotas_LP == answers[0][1]).all()
