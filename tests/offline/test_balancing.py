"""A server without an engine, over load that is made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.snapshot import Agreed
from ep_rebalance.load.trace import MigrationEnd, RecordedSnapshot
from ep_rebalance.load.window import PHASES
from ep_rebalance.migration import schedule
from ep_rebalance.migration.served import Served
from ep_rebalance.offline.balancing import ReplayedServer, round_seconds
from ep_rebalance.offline.generated_load import Timing, generate_steps, synthetic_domains
from ep_rebalance.offline.scoring import balancedness
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.planning.proposal import Proposer
from ep_rebalance.topology import Topology

START = Placement.contiguous(num_layers=4, num_experts=32, num_ranks=4, num_redundant=4)
SNAPSHOT_STEPS = 4
EAGER = {
    "window": {"min_snapshots": 2, "min_tokens": 1},
    "planner": {"interval_snapshots": 2},
    "decision": {"min_gain_over_cost": 0.0},
}
BYTES, BYTES_OF_SEVERAL_ROUNDS = 4096, 20_000


def server(
    expert_bytes: int = BYTES, *, as_recorded: bool = False, **sections: object
) -> ReplayedServer:
    config = load_config(EAGER, sections)
    topology = Topology(node_of_rank=(0, 0, 1, 1))
    return ReplayedServer(
        config,
        proposer=Proposer(
            planner=planner_of("incremental"),
            settings=config.planner,
            decision=config.decision,
            migration=config.migration,
            cost=TokenCost(),
            topology=topology,
            expert_bytes_L=(expert_bytes,) * 4,
        ),
        topology=topology,
        expert_bytes_L=(expert_bytes,) * 4,
        served=Served.initial(START),
        loaded=START,
        as_recorded=as_recorded,
    )


def steady_steps() -> Iterator[NDArray[np.int64]]:
    domains_DLE = synthetic_domains(domains=1, layers=4, experts=32, seed=3)
    return generate_steps(
        domains_DLE, Timing(drift=0.0, wavering=0.0), pairs_per_step=40_000, seed=3
    )


def snapshot(counts_LE: NDArray[np.int64], **changes: object) -> RecordedSnapshot:
    counts_ALE = np.zeros((len(PHASES), *counts_LE.shape), dtype=np.int64)
    counts_ALE[PHASES.index("decode")] = counts_LE
    recorded = RecordedSnapshot(
        counts_ALE=counts_ALE,
        step=0,
        steps=SNAPSHOT_STEPS,
        step_seconds=0.05,
        time=0.0,
        generation=0,
    )
    return replace(recorded, **changes)  # type: ignore[arg-type]


def feed(served: ReplayedServer, count: int, **changes: object) -> None:
    steps = steady_steps()
    for _ in range(count):
        served.snapshot(snapshot(sum(islice(steps, SNAPSHOT_STEPS)), **changes))


def test_steady_skewed_load_ends_even_and_moves_nothing_afterwards() -> None:
    served, steps = server(), steady_steps()
    placements = []
    for _ in range(60):
        served.snapshot(snapshot(sum(islice(steps, SNAPSHOT_STEPS))))
        placements.append(served.placement)
    unseen_NLE = np.array(list(islice(steps, 20)))
    assert balancedness(unseen_NLE, START) < 0.8
    assert balancedness(unseen_NLE, served.placement, served.quotas_LP) > 0.97
    assert all(placement == placements[30] for placement in placements[31:])
    assert {plan.outcome for plan in served.plans[-5:]} == {"no_gain"}


def test_an_accepted_plan_is_served_from_the_snapshot_in_which_its_last_round_falls() -> None:
    served = server()
    feed(served, 4)
    assert served.placement == START
    assert served.plans == []
    feed(served, 1, step=99)
    (plan,) = served.plans
    assert (plan.outcome, plan.generation, plan.served_at) == ("committed", 1, 99)
    assert served.placement == plan.placement != START
    assert plan.moved == plan.placement.changed_slots(START)
    assert sum(plan.bytes.values()) == BYTES * plan.moved


def test_snapshots_that_come_while_experts_move_count_as_one() -> None:
    """As in a server, which takes none meanwhile."""
    served = server(BYTES_OF_SEVERAL_ROUNDS, migration={"max_bytes_per_step": 4096})
    feed(served, 4)
    while not served.plans:
        feed(served, 1)
    joined = served._loop.window.samples()[-1]
    assert joined.steps > 2 * SNAPSHOT_STEPS
    assert joined.generation == 1
    assert joined.step_seconds == pytest.approx(0.05)


def test_a_batch_is_served_while_the_next_one_moves() -> None:
    served = server(
        planner={"max_arrivals_per_rank_and_layer": 1},
        migration={"max_bytes_per_step": 4096, "deadline_steps": 10_000},
    )
    feed(served, 4)
    changed_layers = []
    while not served.plans:
        feed(served, 1)
        changed = (served.placement.slots_LP != START.slots_LP).any(axis=1)
        changed_layers.append(int(changed.sum()))
    assert changed_layers == sorted(changed_layers)
    assert set(changed_layers) > {changed_layers[-1]}
    assert changed_layers[-1] == len(served.plans[0].layers)


def test_a_migration_that_would_take_too_long_is_not_begun() -> None:
    served = server(migration={"max_bytes_per_step": 4096, "deadline_steps": 2})
    feed(served, 8)
    assert {plan.outcome for plan in served.plans} == {"over_budget"}
    assert "migration.deadline_steps=2" in served.plans[0].reason
    assert served.placement == START


def test_quotas_follow_the_load_a_snapshot_after_they_were_fitted() -> None:
    """A server fits them while it goes on to serve, and learns in the next snapshot that all ranks have."""
    served, steps = server(planner={"policy": "none"}), steady_steps()
    seen = []
    for _ in range(4):
        served.snapshot(snapshot(next(steps)))
        seen.append(served.quotas_LP)
    assert served.placement == START
    assert (seen[0] == START.even_quotas_LP()).all()
    assert (seen[1] == seen[0]).all()
    assert (seen[2] != seen[1]).any()
    assert (seen[3] != seen[2]).any()


def test_idle_snapshots_tell_nothing() -> None:
    served = server()
    for _ in range(10):
        served.snapshot(snapshot(np.zeros((4, 32), dtype=np.int64)))
    assert served.plans == []
    assert (served.quotas_LP == START.even_quotas_LP()).all()


def test_weights_that_were_replaced_are_served_as_loaded_under_the_next_generation() -> None:
    served = server()
    feed(served, 5)
    placement = served.placement
    feed(served, 1, agreed=Agreed(replaced=True, reloaded=(0, 2)))
    feed(served, 1)
    assert placement != START
    assert served.placement == placement.replaced((0, 2), START)
    assert len(served._loop.window) == 1, "what was counted before is forgotten"


def test_an_abandoned_migration_leaves_the_batches_that_were_committed() -> None:
    served = server(as_recorded=True, migration={"max_bytes_per_step": 4096})
    feed(served, 2)
    feed(served, 1, agreed=Agreed(planned=True, proposed=True))
    feed(served, 1, agreed=Agreed(scheduled=True))
    feed(served, 1, ended=MigrationEnd(batches=1, abandoned=True))
    (plan,) = served.plans
    assert (plan.outcome, plan.generation) == ("abandoned", 1)
    assert 0 < len(plan.layers) < 4
    changed = (served.placement.slots_LP != START.slots_LP).any(axis=1)
    assert np.flatnonzero(changed).tolist() == sorted(plan.layers)


def test_nothing_is_served_of_a_migration_without_a_committed_batch() -> None:
    served = server(as_recorded=True)
    feed(served, 2)
    feed(served, 1, agreed=Agreed(planned=True, proposed=True))
    feed(served, 1, agreed=Agreed(scheduled=True))
    feed(served, 2, ended=MigrationEnd(batches=0, abandoned=True))
    (plan,) = served.plans
    assert (plan.outcome, plan.generation, plan.placement) == ("abandoned", None, None)
    assert served.placement == START


def test_a_plan_that_failed_on_the_recorded_server_is_not_carried_out() -> None:
    served = server(as_recorded=True)
    feed(served, 2)
    feed(served, 1, agreed=Agreed(planned=True, proposed=False))
    assert [plan.outcome for plan in served.plans] == ["failed"]


def test_a_recorded_pause_holds_only_the_server_that_was_paused() -> None:
    paused = Agreed(paused=True)
    recorded, imagined = server(as_recorded=True), server()
    feed(recorded, 10, agreed=paused)
    feed(imagined, 10, agreed=paused)
    assert recorded.plans == []
    assert imagined.plans != []


def test_a_round_takes_as_long_as_its_busiest_rank() -> None:
    topology = Topology(node_of_rank=(0, 0, 1, 1), bytes_per_second=(1e9, 100.0, 10.0))
    target = Placement(np.roll(START.slots_LP, 9, axis=1), START.num_experts, START.num_ranks)
    migration = schedule(
        START,
        target,
        target.even_quotas_LP(),
        topology=topology,
        expert_bytes_L=[BYTES] * 4,
        pace=Pace.of_bytes(2 * BYTES),
        staging_slots=9,
    )
    moves = [move for batch in migration.batches for move in batch.moves]
    expected = 0.0
    for count, batch in enumerate(migration.batches, start=1):
        for number in range(len(batch.rounds)):
            busy_2R = np.zeros((2, 4))
            for transfer in range(*batch.rounds.first_N1[number : number + 2]):
                move = moves[int(batch.rounds.move[transfer])]
                size = int(batch.rounds.stop[transfer] - batch.rounds.start[transfer])
                busy_2R[0, move.src_rank] += topology.seconds(size, move.link)
                busy_2R[1, move.dst_rank] += topology.seconds(size, move.link)
            expected += busy_2R.max() + topology.round_seconds
        assert round_seconds(migration, count, topology) == pytest.approx(expected)
    assert expected > 0
