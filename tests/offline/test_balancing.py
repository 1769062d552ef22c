from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.offline.balancing import ReplayedBalancer
from ep_rebalance.offline.generated_load import Timing, generate_steps, synthetic_domains
from ep_rebalance.offline.scoring import balancedness
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.topology import Topology

START = Placement.contiguous(num_layers=4, num_experts=32, num_ranks=4, num_redundant=4)
SNAPSHOT_STEPS = 4


def balancer(**planner: object) -> ReplayedBalancer:
    return ReplayedBalancer(
        config=load_config({"planner": planner}),
        planner=planner_of("incremental"),
        cost=TokenCost(),
        topology=Topology(node_of_rank=(0, 0, 1, 1)),
        expert_bytes_L=(1000,) * 4,
        placement=START,
    )


def steady_steps() -> Iterator[NDArray[np.int64]]:
    domains_DLE = synthetic_domains(domains=1, layers=4, experts=32, seed=3)
    return generate_steps(
        domains_DLE, Timing(drift=0.0, wavering=0.0), pairs_per_step=40_000, seed=3
    )


def snapshot(counts_LE: NDArray[np.int64]) -> LoadSample:
    counts_ALE = np.zeros((len(PHASES), *counts_LE.shape), dtype=np.int64)
    counts_ALE[PHASES.index("decode")] = counts_LE
    return LoadSample(counts_ALE=counts_ALE, steps=SNAPSHOT_STEPS, step_seconds=0.05)


def test_steady_skewed_load_ends_even_and_moves_nothing_afterwards() -> None:
    served, steps = balancer(), steady_steps()
    placements = []
    for _ in range(12):
        for _ in range(4):
            served.append(snapshot(sum(islice(steps, SNAPSHOT_STEPS))))
        proposal = served.plan()
        placements.append(served.placement)
    unseen_NLE = np.array(list(islice(steps, 20)))
    assert balancedness(unseen_NLE, START) < 0.8
    assert balancedness(unseen_NLE, served.placement, served.quotas_LP) > 0.97
    assert all(placement == placements[5] for placement in placements[6:])
    assert proposal.trust > 0.9


def test_an_accepted_plan_is_served_with_quotas_of_its_own() -> None:
    served = balancer()
    served.append(snapshot(next(steady_steps())))
    proposal = served.plan()
    assert proposal.decision.accepted
    assert served.placement == proposal.plan.placement != START
    assert (served.quotas_LP == proposal.plan.quotas_LP).all()


def test_a_refused_plan_changes_nothing() -> None:
    served = balancer()
    served.append(snapshot(np.full((4, 32), 1000)))
    served.plan()
    settled = served.placement
    assert not served.plan().decision.accepted
    assert served.placement == settled


def test_quotas_follow_each_snapshot() -> None:
    served, steps = balancer(), steady_steps()
    seen = [served.quotas_LP]
    for _ in range(2):
        served.append(snapshot(next(steps)))
        seen.append(served.quotas_LP)
    assert served.placement == START
    assert (seen[0] != seen[1]).any()
    assert (seen[1] != seen[2]).any()


def test_the_gain_of_a_plan_is_told_by_the_snapshots_after_it() -> None:
    served, steps = balancer(), steady_steps()
    served.append(snapshot(next(steps)))
    assert served.plan().achieved_gain is None
    served.append(snapshot(next(steps)))
    achieved = served.plan().achieved_gain
    assert achieved is not None
    assert achieved > 0.01


def test_idle_snapshots_tell_nothing() -> None:
    served = balancer()
    served.append(snapshot(np.zeros((4, 32), dtype=np.int64)))
    assert (served.quotas_LP == START.even_quotas_LP()).all()
    with pytest.raises(ValueError, match="no snapshot"):
        served.plan()
    served.append(snapshot(next(steady_steps())))
    assert served.plan().decision.accepted
    served.append(snapshot(np.zeros((4, 32), dtype=np.int64)))
    assert served.plan().achieved_gain is None
