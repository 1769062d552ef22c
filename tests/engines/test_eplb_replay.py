"""`replay --policy vllm-eplb` comes to the maps of vLLM's own balancer, its real `EplbState`."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from engine_eplb import Balanced, maps_of
from vllm_groups import IMPORT_SECONDS

from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.offline.eplb_settings import Eplb, EplbSettings
from ep_rebalance.offline.eplb_transfers import sends
from ep_rebalance.offline.vllm_eplb import VllmEplb
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.topology import Topology


@pytest.fixture(scope="module")
def policy(vllm):
    from ep_rebalance.engines.vllm.seams import eplb_policy

    return eplb_policy.rebalance_experts


def peer_of(balanced, policy):
    settings = EplbSettings(
        step_interval=balanced.interval,
        window_size=balanced.window,
        use_async=balanced.use_async,
        expert_groups=balanced.groups,
    )
    return VllmEplb(
        Eplb(policy=policy, settings=settings),
        loaded=Placement.contiguous(
            num_layers=balanced.layers,
            num_experts=balanced.experts,
            num_ranks=balanced.ranks,
            num_redundant=balanced.redundant,
        ),
        topology=Topology.node_by_node(balanced.ranks, balanced.ranks // balanced.nodes),
        expert_bytes_L=[1] * balanced.layers,
        expert_time=ExpertTime(fraction=1.0),
    )


def snapshots_of(balanced, steps=1):
    """A trace of single steps, or of several steps each."""
    for first in range(0, balanced.steps, steps):
        counted = [s for s in range(first, first + steps) if s not in balanced.idle_steps]
        if counted:
            counts_LE = sum(balanced.counts_LE(step) for step in counted)
            yield RecordedSnapshot(
                counts_ALE=np.stack([counts_LE // 3, counts_LE - counts_LE // 3]).astype(np.uint32),
                step=1000 + counted[-1] + 1,
                steps=len(counted),
                step_seconds=0.05,
                time=float(first),
                generation=0,
            )


CASES = {
    "synchronous": Balanced(interval=20, window=8, use_async=False),
    "the first step counted, not kept": Balanced(interval=20, window=3, use_async=False),
    "asynchronous": Balanced(interval=20, window=8, use_async=True),
    "counted under older maps": Balanced(interval=20, window=45, use_async=False),
    "older maps, asynchronous": Balanced(interval=20, window=20, use_async=True),
    "still arriving at the next": Balanced(interval=4, window=4, use_async=True, layers=7),
    "every step": Balanced(interval=1, window=1, use_async=False, steps=40),
    "steps without tokens": Balanced(
        interval=20, window=9, use_async=False, idle_steps=(3, 17, 18, 40, 41, 42)
    ),
    "no redundant experts": Balanced(interval=16, window=16, use_async=True, redundant=0),
    "hashed replicas": Balanced(interval=20, window=8, use_async=False, hashed=True),
    "four ranks": Balanced(interval=20, window=30, use_async=True, ranks=4, experts=16),
    "groups on nodes": Balanced(
        interval=20, window=8, use_async=False, ranks=4, nodes=2, groups=4, experts=16
    ),
    "nodes without groups": Balanced(
        interval=20, window=8, use_async=False, ranks=4, nodes=2, experts=16
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_map_of_every_step_is_that_of_the_real_balancer(policy, ranks_of, name):
    balanced = CASES[name]
    told = ranks_of[balanced.ranks].run(maps_of, balanced, timeout=IMPORT_SECONDS)
    for other in told[1:]:
        assert all(map(np.array_equal, told[0], other))
    assert len({slots_LP.tobytes() for slots_LP in told[0]}) > 3
    peer, served = peer_of(balanced, policy), {}
    for snapshot in snapshots_of(balanced):
        peer.snapshot(snapshot)
        served[snapshot.step - 1001] = peer.placement.slots_LP
    for step, slots_LP in served.items():
        if step:
            np.testing.assert_array_equal(slots_LP, told[0][step - 1], str(step))


@pytest.mark.parametrize("use_async", [False, True])
def test_with_snapshots_of_16_steps_the_same_steps_and_nearly_as_many_moves(
    policy, ranks_of, use_async
):
    balanced = Balanced(interval=50, window=40, use_async=use_async, steps=400, hashed=True)
    (told, _) = ranks_of[2].run(maps_of, balanced, timeout=IMPORT_SECONDS)
    changed = [step for step in range(1, 400) if not np.array_equal(told[step - 1], told[step])]
    moved = sum(int((told[step - 1] != told[step]).sum()) for step in changed)
    peer = peer_of(balanced, policy)
    for snapshot in snapshots_of(balanced, 16):
        peer.snapshot(snapshot)
    plans = [plan.step - 1001 for plan in peer.plans]
    assert plans == list(range(11, 400, 50))
    first = changed if not use_async else [step - 1 for step in changed]
    assert set(first) & set(range(11, 400, 50)) == set(plans)
    assert sum(plan.moved for plan in peer.plans) == pytest.approx(moved, rel=0.05)


def test_the_first_rearrangement_comes_after_a_quarter_of_the_interval(policy):
    peer = peer_of(Balanced(interval=3000, window=1000, use_async=True), policy)
    balanced = replace(CASES["synchronous"], steps=1)
    (snapshot,) = snapshots_of(balanced)
    steps = 16
    for number in range(1, 60):
        peer.snapshot(replace(snapshot, step=steps * number, steps=steps))
    assert [plan.step for plan in peer.plans] == [750]


def test_experts_come_from_where_the_real_balancer_sends_them(vllm):
    from vllm.distributed.eplb.migration_scheduler import schedule_migration_batches

    random = np.random.default_rng(0)
    for _ in range(200):
        old_P, new_P = (
            np.append(random.permutation(6), random.integers(0, 6, 6)) for _ in range(2)
        )
        batches = schedule_migration_batches(3, old_P, new_P)
        told = sorted(
            (expert, flow.src_rank, flow.dst_rank)
            for flow in itertools.chain.from_iterable(batches)
            for expert in flow.expert_ids
        )
        assert sorted(sends(old_P, new_P, 4)) == told
