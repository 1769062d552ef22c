"""The whole loop over gloo, without an engine: skewed traffic goes in, experts move, nothing breaks.

After every step each rank checks that each of its slots holds the expert that the placement says,
bit for bit, and that the routing tables lead every token to its expert.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from balanced_engine import (
    DTYPE,
    LAYERS,
    SHAPES,
    TOKENS,
    TOP_K,
    Engine,
    assert_in_step,
    eager,
    has_generation,
    identity,
    spoil_votes,
)
from disks import until
from expert_weights import wrong_slots
from ranks import Ranks

from ep_rebalance.balancer import planner_thread, state_saver
from ep_rebalance.kernels.shared_arithmetic import DECODE, PREFILL
from ep_rebalance.load.state import load_state
from ep_rebalance.planning import proposal
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.telemetry import file_health
from ep_rebalance.telemetry.metrics import Status, decode, encode

pytestmark = pytest.mark.usefixtures("compiled_planner")


class Never(ThreadPoolExecutor):
    """Never ends a job."""

    def submit(self, function, /, *args, **kwargs):
        return Future()


# --- experts move and the load evens out


def rebalance(rank, size, config):
    engine = Engine(rank, size, config)
    engine.run_until(has_generation(2))
    return engine.seen, engine.imbalances(), engine.rebalancer.status_now()


@pytest.mark.parametrize(
    ("size", "planner"),
    [
        pytest.param(2, {}, id="two ranks"),
        pytest.param(2, {"redundant_experts": 4}, id="two ranks with redundant experts"),
        pytest.param(4, {"redundant_experts": 8}, id="four ranks with redundant experts"),
        pytest.param(2, {"policy": "greedy", "redundant_experts": 2}, id="greedy"),
    ],
)
def test_imbalance_falls_while_every_slot_stays_right(ranks_of: dict[int, Ranks], size, planner):
    answers = ranks_of[size].run(rebalance, size, eager({"planner": planner}))
    assert_in_step([seen for seen, _, _ in answers])
    (before, after), status = answers[0][1:]
    assert after - 1 < 0.6 * (before - 1)
    assert status.plans["committed"] >= 2
    assert status.plans["abandoned"] == status.plans["failed"] == 0
    assert len(status.round_stall_seconds.values) > status.plans["committed"]


def test_status_of_all_ranks_counts_the_same(two_ranks: Ranks):
    ours, theirs = (status for _, _, status in two_ranks.run(rebalance, 2, eager()))
    fields = (
        "steps", "snapshots", "imbalance", "contiguous_imbalance", "rank_tokens", "phase_tokens",
        "migrated_experts", "migrated_bytes", "generation", "migrating",
    )  # fmt: skip
    for field in fields:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.migrated_experts["intranode"] > 0
    assert ours.migrated_bytes["intranode"] >= 4 * 827 * ours.migrated_experts["intranode"]


def rebalance_in_the_background(rank, size, config):
    engine = Engine(rank, size, config, executor=ThreadPoolExecutor)
    deadline = time.monotonic() + 40
    late = torch.zeros(1)
    while engine.rebalancer.served.generation < 1 and not late.item():
        engine.step()
        late[0] = time.monotonic() > deadline
        dist.all_reduce(late)
    return engine.seen, engine.rebalancer.served.generation


def test_planning_in_its_own_thread_keeps_the_ranks_in_step(two_ranks: Ranks):
    answers = two_ranks.run(rebalance_in_the_background, 2, eager())
    assert_in_step([seen for seen, _ in answers])
    assert answers[0][1] == 1


def tokens_seen(rank, size, config):
    engine = Engine(rank, size, config)
    steps = 3 * (config.window.snapshot_steps + 1)
    for _ in range(steps):
        engine.step()
    return engine.rebalancer.status_now()


def test_status_counts_each_token_once_by_phase_and_by_rank(two_ranks: Ranks):
    status: Status = two_ranks.run(tokens_seen, 2, eager({"mode": "observe"}))[0]
    counted_steps = 3 * 3 - 1
    assert status.phase_tokens == {
        "prefill": 2 * counted_steps * 16,
        "decode": 2 * counted_steps * 8,
    }
    assert sum(status.rank_tokens) == 2 * counted_steps * TOKENS * TOP_K * LAYERS
    assert {PREFILL, DECODE} == {0, 1}
    assert decode(encode(status)) == status


# --- quotas follow the load


def split_only(rank, size, config):
    engine = Engine(rank, size, config)
    for _ in range(30):
        engine.step(skew=3.0)
    return engine.seen, engine.imbalances()


def test_quotas_follow_the_load_on_all_ranks_in_the_same_step_without_a_move(
    ranks_of: dict[int, Ranks],
):
    config = eager({"planner": {"policy": "none", "redundant_experts": 8}})
    answers = ranks_of[4].run(split_only, 4, config)
    assert_in_step([seen for seen, _ in answers])
    seen, (before, after) = answers[0]
    assert {step.generation for step in seen} == {0}
    assert len({step.slots_LP for step in seen}) == 1
    assert len({step.quotas_LP for step in seen}) > 4
    assert after - 1 < 0.9 * (before - 1)


def fail_to_split_on_one_rank(rank, size, config):
    def raising(*args):
        raise SystemExit("no split today")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(TokenCost, "split", raising)
        engine = Engine(rank, size, config)
        for _ in range(12):
            engine.step()
    unsplit = engine.seen[-1]
    engine.run_until(has_generation(1))
    for _ in range(12):
        engine.step()
    errors = engine.rebalancer.status_now().internal_errors
    return engine.seen, unsplit, errors["quotas"]


def test_quotas_that_one_rank_cannot_fit_are_taken_up_by_none(two_ranks: Ranks):
    config = eager(
        {"window": {"min_snapshots": 5}, "planner": {"redundant_experts": 4}},
    )
    answers = two_ranks.run(fail_to_split_on_one_rank, 2, config)
    assert_in_step([seen for seen, _, _ in answers])
    assert [errors for _, _, errors in answers] == [0, 1]
    seen, unsplit, _ = answers[0]
    assert unsplit == seen[0]
    assert seen[-1].quotas_LP != unsplit.quotas_LP


# --- nothing moves where nothing should


def observe(rank, size, config):
    engine = Engine(rank, size, config)
    for _ in range(40):
        engine.step()
    return engine.seen, engine.rebalancer.status_now()


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        pytest.param({"mode": "observe"}, None, id="mode observe"),
        pytest.param({"mode": "static", "state": {"path": "x.npz"}}, None, id="mode static"),
        pytest.param({"planner": {"policy": "none"}}, None, id="policy none"),
        pytest.param({"window": {"min_tokens": 10**9}}, None, id="too few tokens"),
        pytest.param({"decision": {"min_gain": 0.9}}, "no_gain", id="too little gain"),
        pytest.param(
            {"decision": {"min_gain_over_cost": 1e12, "horizon_steps": 1}}, "over_budget",
            id="too little gain for its cost",
        ),
        pytest.param({"migration": {"deadline_steps": 1}}, "over_budget", id="too many rounds"),
    ],
)  # fmt: skip
def test_nothing_moves_where_nothing_should(two_ranks: Ranks, change, outcome):
    answers = two_ranks.run(observe, 2, eager(change))
    assert_in_step([seen for seen, _ in answers])
    assert len(set(answers[0][0])) == 1
    status = answers[0][1]
    assert status.generation == 0
    assert status.snapshots >= 10
    assert status.imbalance == pytest.approx(status.contiguous_imbalance)
    plans = {name for name, count in status.plans.items() if count}
    assert plans == ({outcome} if outcome else set())


def stay_idle(rank, size, config):
    engine = Engine(rank, size, config)
    for _ in range(40):
        engine.step(tokens=0)
    return engine.rebalancer.status_now()


def test_idle_steps_count_nothing_and_plan_nothing(two_ranks: Ranks):
    status = two_ranks.run(stay_idle, 2, eager({"window": {"min_tokens": 0}}))[0]
    assert status.snapshots > 5
    assert status.imbalance == []
    assert not any(status.plans.values())


def work_on_one_rank(rank, size, config):
    engine = Engine(rank, size, config)
    engine.run_until(has_generation(1), tokens=TOKENS if rank == 0 else 0)
    return engine.seen


def test_a_rank_without_requests_keeps_in_step(two_ranks: Ranks):
    assert_in_step(two_ranks.run(work_on_one_rank, 2, eager()))


# --- faults


class Unspeakable(BaseException):
    """Ends a thread, and cannot even be told."""

    def __str__(self) -> str:
        raise ValueError("no text")


def plan_raises_once(rank, size, config, error):
    make_plan, calls = proposal.make_plan, []

    def raising(*args):
        calls.append(args)
        if len(calls) == 1:
            raise error("no plan today")
        return make_plan(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposal, "make_plan", raising)
        engine = Engine(rank, size, config)
        engine.run_until(has_generation(1))
    return engine.seen, engine.rebalancer.status.plans


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError,
        MemoryError,
        RecursionError,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        Unspeakable,
    ],
)
def test_a_planner_that_raises_is_counted_and_the_next_plan_is_made(two_ranks: Ranks, error):
    answers = two_ranks.run(plan_raises_once, 2, eager(), error)
    assert_in_step([seen for seen, _ in answers])
    assert answers[0][1]["failed"] == 1
    assert answers[0][1]["committed"] == 1


def schedule_raises_once(rank, size, config):
    schedule, calls = planner_thread.schedule_as_configured, []

    def raising(*args, **kwargs):
        calls.append(args)
        if rank == 1 and len(calls) == 1:
            raise MemoryError("no room for the rounds")
        return schedule(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_thread, "schedule_as_configured", raising)
        engine = Engine(rank, size, config)
        engine.run_until(has_generation(1))
    return engine.seen, engine.rebalancer.status.plans


def test_a_rank_that_cannot_work_out_the_rounds_stops_all_ranks_from_beginning(two_ranks: Ranks):
    answers = two_ranks.run(schedule_raises_once, 2, eager())
    assert_in_step([seen for seen, _ in answers])
    assert [plans["failed"] for _, plans in answers] == [1, 1]
    assert [plans["committed"] for _, plans in answers] == [1, 1]


def spoil(rank, size, config, spoilt_batch):
    engine = Engine(rank, size, config)
    spoil_votes(engine, (spoilt_batch,))
    engine.run_until(lambda status: status.plans["abandoned"])
    abandoned = engine.seen[-1], engine.rebalancer.status.message
    engine.run_until(lambda status: status.plans["committed"])
    return engine.seen, abandoned, engine.rebalancer.status


def test_damaged_experts_are_never_served_and_later_migrations_work(two_ranks: Ranks):
    answers = two_ranks.run(spoil, 2, eager(), 1)
    assert_in_step([seen for seen, _, _ in answers])
    seen, (last, message), status = answers[0]
    assert last == seen[0]
    assert "1 with a checksum error" in message
    assert status.generation == 1
    assert status.migrating == 0


def test_a_fault_in_a_later_batch_keeps_the_layers_that_were_committed(two_ranks: Ranks):
    """They are whole, and served under a generation of their own."""
    config = eager({"planner": {"max_arrivals_per_rank_and_layer": 1, "max_moved_fraction": 1.0}})
    answers = two_ranks.run(spoil, 2, config, 2)
    assert_in_step([seen for seen, _, _ in answers])
    seen, (last, _), status = answers[0]
    assert last.generation == 1
    assert last.slots_LP != seen[0].slots_LP
    assert status.generation == 2


def fail_to_pack(rank, size, config):
    engine = Engine(rank, size, config)
    memory = engine.rebalancer.migrator._memory
    if rank == 0:
        memory.read = None
    engine.run_until(lambda status: status.plans["abandoned"])
    abandoned = engine.seen[-1]
    if rank == 0:
        del memory.read
    engine.run_until(has_generation(1))
    return engine.seen, abandoned, engine.rebalancer.status


def test_a_rank_that_cannot_pack_makes_all_ranks_abandon_the_migration(two_ranks: Ranks):
    answers = two_ranks.run(fail_to_pack, 2, eager())
    assert_in_step([seen for seen, _, _ in answers])
    for seen, abandoned, status in answers:
        assert abandoned == seen[0]
        assert status.plans["abandoned"] == 1
        assert status.plans["committed"] == 1


def plan_for_ever(rank, size, config):
    engine = Engine(rank, size, config, executor=Never)
    for _ in range(40):
        engine.step()
    return engine.seen, engine.rebalancer.status


def test_a_planner_that_does_not_end_is_shown_and_serving_goes_on(two_ranks: Ranks):
    config = eager({"planner": {"deadline_seconds": 1e-6}})
    answers = two_ranks.run(plan_for_ever, 2, config)
    assert_in_step([seen for seen, _ in answers])
    assert len(answers[0][0]) == 40
    assert answers[0][1].stuck == 1
    assert "planner" in answers[0][1].message


# --- saved and restored


def save(rank, size, config):
    engine = Engine(rank, size, config)
    engine.run_until(has_generation(2))
    return engine.rebalancer.served


def saved(path, redundant):
    """The second generation, once it is on disk."""
    states = []

    def is_there():
        states.append(load_state(path, identity(2, redundant)))
        return states[-1] is not None and states[-1].header.generation == 2

    until(is_there)
    return states[-1]


def take_up(rank, size, config, state):
    engine = Engine(rank, size, config)
    engine.rebalancer.migrator.restore(state.placement, state.quotas_LP, state.header.generation)
    wrong = wrong_slots(engine.tensors, state.placement, rank, DTYPE, SHAPES)
    restored = engine.rebalancer.served
    for _ in range(12):
        engine.step()
    static = engine.seen
    return wrong, restored, engine.rebalancer.status.generation, static


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_saved_placement_is_taken_up_by_new_ranks(two_ranks: Ranks, tmp_path: Path, redundant):
    path = tmp_path / "state.npz"
    config = eager({"planner": {"redundant_experts": redundant}, "state": {"path": str(path)}})
    served = two_ranks.run(save, 2, config)[0]
    state = saved(path, redundant)
    assert state.placement == served.placement
    assert (state.quotas_LP == served.quotas_LP).all()
    assert (state.header.generation, served.generation) == (2, 2)
    assert state.load_LE.sum() > 0

    answers = two_ranks.run(take_up, 2, eager(config.as_dict(), {"mode": "static"}), state)
    assert_in_step([static for *_, static in answers])
    for wrong, restored, generation, static in answers:
        assert wrong == []
        assert restored.placement == served.placement
        assert (restored.quotas_LP == served.quotas_LP).all()
        assert generation == restored.generation == 2
        assert {(step.generation, step.slots_LP) for step in static} == {
            (2, served.placement.slots_LP.tobytes())
        }


def take_up_and_go_on(rank, size, config, state):
    engine = Engine(rank, size, config)
    engine.rebalancer.migrator.restore(state.placement, state.quotas_LP, state.header.generation)
    engine.run_until(has_generation(3), skew=0.5)
    return engine.seen


def test_balancing_goes_on_from_a_restored_placement(two_ranks: Ranks, tmp_path: Path):
    config = eager({"state": {"path": str(tmp_path / "state.npz")}})
    two_ranks.run(save, 2, config)
    state = saved(Path(config.state.path), 0)
    answers = two_ranks.run(take_up_and_go_on, 2, config, state)
    assert_in_step(answers)
    assert answers[0][-1].generation == 3


def save_where_it_cannot_be(rank, size, config):
    engine = Engine(rank, size, config)
    engine.run_until(has_generation(2))
    if rank == 0:
        until(lambda: engine.rebalancer.status_now().file_failing["state"])
    status = engine.rebalancer.status_now()
    return status.plans["committed"], status.file_faults, status.state_saved_timestamp


def test_a_state_file_that_cannot_be_written_stops_nothing_and_is_told(two_ranks, tmp_path: Path):
    config = eager({"state": {"path": str(tmp_path / "missing" / "state.npz")}})
    (first, faults, saved_at), other = two_ranks.run(save_where_it_cannot_be, 2, config)
    assert (first, saved_at) == (2, 0.0)
    assert "No such file" in faults["state"]
    assert other == (2, {}, 0.0)


def save_on_a_disk_that_hangs(rank, size, config):
    goes_on = threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state_saver, "save_state", lambda path, state: goes_on.wait(60))
        patched.setattr(file_health, "OVERDUE_SECONDS", 0.05)
        engine = Engine(rank, size, config)
        engine.run_until(has_generation(2))
        if rank == 0:
            until(lambda: engine.rebalancer.status_now().file_failing["state"])
        status = engine.rebalancer.status_now()
        goes_on.set()
        return status.plans["committed"], status.stuck, status.file_faults


def test_a_disk_that_hangs_holds_up_no_plan_and_is_told(two_ranks, tmp_path: Path):
    config = eager({"state": {"path": str(tmp_path / "state.npz")}})
    (committed, stuck, faults), other = two_ranks.run(save_on_a_disk_that_hangs, 2, config)
    assert (committed, stuck) == (2, 0)
    assert "the disk has not taken the state for" in faults["state"]
    assert other == (2, 0, {})


# --- an operator's requests


def pause_at(activity):
    """Rank 0 is asked to pause in the first step after which it does `activity`; what was committed."""

    def run(rank, size, config):
        engine = Engine(rank, size, config)
        status = engine.rebalancer.status
        engine.run_until(lambda status: status.activity == activity)
        refusals = [engine.rebalancer.ask("pause"), engine.rebalancer.ask("pause")]
        for _ in range(80):
            engine.step()
        shown = engine.rebalancer.status_now()
        paused = shown.paused, status.activity, sum(status.plans.values()), status.generation
        engine.rebalancer.ask("resume")
        engine.run_until(has_generation(status.generation + 1))
        return engine.seen, refusals, paused, engine.rebalancer.status_now()

    return run


def pause_while_watching(rank, size, config):
    return pause_at("watching")(rank, size, config)


def pause_while_planning(rank, size, config):
    return pause_at("planning")(rank, size, config)


def pause_while_migrating(rank, size, config):
    return pause_at("migrating")(rank, size, config)


@pytest.mark.parametrize(
    ("job", "plans", "generation"),
    [(pause_while_watching, 0, 0), (pause_while_planning, 1, 0), (pause_while_migrating, 1, 1)],
)
def test_a_pause_lets_no_plan_begin_and_ends_with_a_resume(
    two_ranks: Ranks, job, plans, generation
):
    answers = two_ranks.run(job, 2, eager())
    assert_in_step([answer[0] for answer in answers])
    _, refusals, paused, status = answers[0]
    assert refusals == ["", ""]
    assert paused == (1, "watching", plans, generation)
    assert status.paused == 0
    assert status.generation == generation + 1
    assert answers[1][1] == [None, None]


def ask_for_a_plan(rank, size, config):
    engine = Engine(rank, size, config)
    for _ in range(10):
        engine.step()
    idle = sum(engine.rebalancer.status.plans.values())
    refusals = [engine.rebalancer.ask("rebalance"), engine.rebalancer.ask("rebalance")]
    for _ in range(200):
        engine.step()
    return engine.seen, idle, refusals, engine.rebalancer.status


def test_a_plan_can_be_asked_for_and_is_made_once(two_ranks: Ranks):
    config = eager({"window": {"min_tokens": 10**9}})  # so that none is made unasked
    answers = two_ranks.run(ask_for_a_plan, 2, config)
    assert_in_step([seen for seen, *_ in answers])
    _, idle, refusals, status = answers[0]
    assert idle == 0
    assert refusals == ["", "a plan is already requested or under way"]
    assert (sum(status.plans.values()), status.generation) == (1, 1)
    assert [commit.generation for commit in status.commits] == [1]
    assert status.commits[0].experts == sum(status.migrated_experts.values())


def ask_before_any_traffic(rank, size, config):
    engine = Engine(rank, size, config)
    engine.rebalancer.ask("rebalance")
    for _ in range(20):
        engine.step(tokens=0)
    idle = engine.rebalancer.status.activity
    engine.run_until(has_generation(1))
    return engine.seen, idle


def test_a_plan_that_was_asked_for_waits_for_traffic(two_ranks: Ranks):
    answers = two_ranks.run(ask_before_any_traffic, 2, eager())
    assert_in_step([seen for seen, _ in answers])
    assert answers[0][1] == "watching"
