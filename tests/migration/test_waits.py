"""Neither a plan's broadcast nor rounds nor votes make the host wait for the device."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from migration_rig import Rig
from plans import PLACEMENT, plan_of
from step_path import DEVICE, recording_waits
from torch.testing._internal.distributed.fake_pg import FakeStore

from ep_rebalance.collectives.plan_broadcast import PlanBroadcast
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.planning.pace import Pace


@pytest.fixture(params=[0, 1])
def fake_group(request) -> Iterator[dist.ProcessGroup]:
    """Of two ranks; takes tensors of any device and carries nothing."""
    dist.init_process_group("fake", rank=request.param, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["aligned", "odd sizes"])
def test_rounds_and_votes_wait_for_nothing(fake_group, dtype):
    rig = Rig(dist.get_rank(fake_group), 2, seed=5, max_bytes=256, dtype=dtype)
    staging = len(rig.exchange.staging)
    with recording_waits() as waits:
        tensors = [[tensor.to(DEVICE) for tensor in layer] for layer in rig.tensors]
        exchange = RoundExchange(
            group=fake_group, memory=ExpertMemory(tensors), max_bytes=256, staging_slots=staging
        )
        exchange.warm_up()
        waits.clear()
        for batch in rig.migration.batches:
            exchange.begin_batch(batch)
            for number in range(len(batch.rounds)):
                exchange.exchange(batch, number)
            vote = exchange.vote(batch)
            waits.end_step()
            assert not exchange.faults_of(vote)
            assert not exchange._transport_failed
    assert rig.migration.num_rounds > 5
    assert waits == []


def test_a_plan_that_is_broadcast_waits_for_nothing(fake_group):
    with recording_waits() as waits:
        plans = PlanBroadcast(group=fake_group, shape=PLACEMENT.slots_LP.shape, device=DEVICE)
        plans.warm_up()
        waits.clear()
        for _ in range(5):
            copy = plans.begin(plan_of(PLACEMENT, PLACEMENT.even_quotas_LP()), Pace.of_bytes(1))
            waits.end_step()
            copy.result()
    assert waits == []
