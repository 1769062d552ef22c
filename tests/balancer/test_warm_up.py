"""What is done before serving so that a first migration meets nothing new: weights stay as they are."""

import pytest
import torch
import torch.distributed as dist
from migration_rig import Rig
from plans import PLACEMENT, QUOTAS_LP, plan_of
from ranks import Ranks

from ep_rebalance.collectives.plan_broadcast import PlanBroadcast, read_plan
from ep_rebalance.planning.pace import Pace

pytestmark = pytest.mark.usefixtures("compiled_schedule")


def warm_up_then_migrate(rank, size):
    rig, peers = Rig(rank, size, seed=5), []
    all_to_all = dist.all_to_all_single

    def watched(received, sent, receive_R, send_R, group):
        peers.append((receive_R, send_R))
        return all_to_all(received, sent, receive_R, send_R, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", watched)
        rig.exchange.warm_up()
    untouched = rig.wrong_slots(rig.source) == [] and not rig.exchange.staging.any()
    return peers, untouched, rig.migrate(), rig.wrong_slots(rig.target)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_pair_of_ranks_is_connected_and_nothing_else_changed(
    ranks_of: dict[int, Ranks], size
):
    for peers, untouched, votes, wrong in ranks_of[size].run(warm_up_then_migrate, size):
        ((receive_R, send_R),) = peers
        assert len(receive_R) == len(send_R) == size
        assert min(*receive_R, *send_R) > 0
        assert untouched
        assert not any(votes)
        assert wrong == []


def broadcast_twice(rank):
    """Only rank 0 has a plan; it is sent as it was put, whatever was sent before."""
    plans = PlanBroadcast(
        group=dist.group.WORLD, shape=PLACEMENT.slots_LP.shape, device=torch.device("cpu")
    )
    plans.warm_up()
    plan = plan_of(PLACEMENT, QUOTAS_LP) if rank == 0 else None
    slots_LP, _, _ = read_plan(plans.begin(plan, Pace.of_bytes(1)).result().numpy())
    return (slots_LP == PLACEMENT.slots_LP).all()


def test_a_plan_after_warming_up_is_sent_whole(two_ranks: Ranks):
    assert two_ranks.run(broadcast_twice) == [True, True]
