"""Plan broadcast: every rank reads the same bits of rank 0's plan."""

import numpy as np
import torch
import torch.distributed as dist
from plans import PLACEMENT, QUOTAS_LP, plan_of
from ranks import Ranks

from ep_rebalance.collectives.plan_broadcast import QUOTA_UNIT, PlanBroadcast, read_plan
from ep_rebalance.planning.pace import Pace

PACES = (
    lambda rank: Pace(max_bytes=7 + rank, max_internode_bytes=5, layers=(1, 0), hurried=rank == 0),
    lambda rank: Pace(max_bytes=1 << 40, max_internode_bytes=9 + rank, layers=(1,)),
    lambda rank: Pace.of_bytes(1 + rank),
)
"""What each rank would have, one broadcast after another."""


def broadcast(rank):
    """Rank 1 has a plan of its own, which nobody asked for."""
    plans = PlanBroadcast(
        group=dist.group.WORLD, shape=PLACEMENT.slots_LP.shape, device=torch.device("cpu")
    )
    plan = plan_of(PLACEMENT, QUOTAS_LP if rank == 0 else PLACEMENT.even_quotas_LP())
    return [read_plan(plans.begin(plan, pace_of(rank)).result().numpy()) for pace_of in PACES]


def test_all_ranks_read_the_plan_of_rank_0(two_ranks: Ranks):
    answers = two_ranks.run(broadcast)
    for slots_LP, quotas_LP, _ in [plan for plans in answers for plan in plans]:
        assert slots_LP.dtype == np.int32
        assert (slots_LP == PLACEMENT.slots_LP).all()
        assert np.abs(quotas_LP - QUOTAS_LP).max() <= 0.5 / QUOTA_UNIT
        assert (quotas_LP == answers[0][0].quotas_LP).all()


def test_all_ranks_have_the_pace_of_rank_0(two_ranks: Ranks):
    for plans in two_ranks.run(broadcast):
        assert [plan.pace for plan in plans] == [pace_of(0) for pace_of in PACES]
