"""One value that cannot be, in any stage: it is refused there and counted, and balancing goes on."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from balanced_engine import Engine, assert_in_step, eager, has_generation
from ranks import Ranks

from ep_rebalance.balancer import planner_thread
from ep_rebalance.planning import proposal
from ep_rebalance.planning.track_record import Promise
from ep_rebalance.telemetry.metrics import decode, encode

pytestmark = pytest.mark.usefixtures("compiled_planner")

NAN, INF = float("nan"), float("inf")


def quotas_are_shares(engine: Engine) -> bool:
    engine.rebalancer.served.placement.check_quotas(engine.rebalancer.served.quotas_LP)
    return True


def once(original, spoil):
    """`original`, of which the first result is spoilt."""
    calls = []

    def first_spoilt(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(args)
        return spoil(result) if len(calls) == 1 else result

    return first_spoilt


def spoilt_quotas(plan):
    quotas_LP = plan.quotas_LP.copy()
    quotas_LP[0, 0] = NAN
    return replace(plan, quotas_LP=quotas_LP)


SPOILT_PLANS = {
    "quota that is not a number": spoilt_quotas,
    "quotas beyond all tokens": lambda plan: replace(plan, quotas_LP=2.0 * plan.quotas_LP),
    "endless gain": lambda plan: replace(
        plan, imbalance_before_L=np.full_like(plan.imbalance_before_L, INF)
    ),
    "imbalance that is not a number": lambda plan: replace(
        plan, imbalance_after_L=np.full_like(plan.imbalance_after_L, NAN)
    ),
}


def plan_is_spoilt(rank, size, config, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposal, "make_plan", once(proposal.make_plan, SPOILT_PLANS[kind]))
        engine = Engine(rank, size, config)
        engine.run_until(has_generation(1))
    return engine.seen, engine.rebalancer.status_now().plans, quotas_are_shares(engine)


@pytest.mark.parametrize("kind", SPOILT_PLANS)
def test_a_plan_that_cannot_be_is_a_failed_plan(two_ranks: Ranks, kind):
    answers = two_ranks.run(plan_is_spoilt, 2, eager({"planner": {"redundant_experts": 4}}), kind)
    assert_in_step([seen for seen, _, _ in answers])
    assert answers[0][1]["failed"] == 1
    assert answers[0][1]["committed"] == 1


def wire_is_spoilt(rank, size, config):
    def spoil(plan):
        return plan._replace(quotas_LP=np.full_like(plan.quotas_LP, -8.6e9))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(planner_thread, "read_plan", once(planner_thread.read_plan, spoil))
        engine = Engine(rank, size, config)
        engine.run_until(has_generation(1))
    return engine.seen, engine.rebalancer.status_now().plans, quotas_are_shares(engine)


def test_quotas_that_cannot_be_are_refused_as_they_come_from_the_wire(two_ranks: Ranks):
    answers = two_ranks.run(wire_is_spoilt, 2, eager())
    assert_in_step([seen for seen, _, _ in answers])
    assert [plans["failed"] for _, plans, _ in answers] == [1, 1]


def outcome_is_spoilt(rank, size, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Promise, "achieved", once(Promise.achieved, lambda _: NAN))
        engine = Engine(rank, size, config)
        engine.run_until(has_generation(3))
    status = engine.rebalancer.status_now()
    proposed = engine.rebalancer._jobs.proposal
    return engine.seen, None if proposed is None else proposed.trust, decode(encode(status))


def test_an_outcome_that_is_not_a_number_is_not_learned_from(two_ranks: Ranks):
    answers = two_ranks.run(outcome_is_spoilt, 2, eager())
    assert_in_step([seen for seen, _, _ in answers])
    _, trust, status = answers[0]
    assert 0.1 <= trust <= 1.0
    assert status.internal_errors["gain"] == 1


def counts_are_spoilt(rank, size, config, count):
    engine = Engine(rank, size, config)
    for _ in range(config.window.snapshot_steps):
        engine.step()
    if rank == 1:
        engine.counts.counts_LAE[0, 0, 0] = count
    engine.run_until(has_generation(1))
    status = engine.rebalancer.status_now()
    return engine.seen, status, quotas_are_shares(engine)


@pytest.mark.parametrize("count", [-5000, 1 << 62], ids=["below 0", "beyond all tokens"])
def test_counts_that_cannot_be_are_left_out_on_all_ranks(two_ranks: Ranks, count):
    answers = two_ranks.run(counts_are_spoilt, 2, eager(), count)
    assert_in_step([seen for seen, _, _ in answers])
    for _, status, _ in answers:
        assert status.internal_errors["snapshot"] == 1
        assert 0 < sum(status.rank_tokens) < 1 << 40


def times_are_spoilt(rank, size, config, seconds):
    engine = Engine(rank, size, config)
    for number in range(12):
        if rank == 1 and number == 5:
            engine.rebalancer.step(seconds)
        else:
            engine.step()
    return engine.rebalancer.status_now()


@pytest.mark.parametrize("seconds", [NAN, INF, -INF, -1e300])
def test_a_step_time_that_cannot_be_is_no_time(two_ranks: Ranks, seconds):
    ours, theirs = two_ranks.run(times_are_spoilt, 2, eager({"mode": "observe"}), seconds)
    assert Counter(ours.internal_errors) == Counter()
    assert theirs.internal_errors["step_times"] == 1
    assert 0 < ours.step_seconds == theirs.step_seconds < 60
