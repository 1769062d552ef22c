"""The loop alone: what it asks for, answered by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.balancer.asks import (
    Ask,
    FitQuotas,
    Migrate,
    NextSnapshot,
    Propose,
    ServeLoaded,
    TakeRounds,
    TakeUpQuotas,
    Tell,
    WorkOutRounds,
)
from ep_rebalance.balancer.loop import BalancingLoop
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.snapshot import NOTHING_AGREED, Agreed, Snapshot
from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration import Migration, schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.telemetry.events import PlanEnded
from ep_rebalance.topology import Topology

SETTINGS = {
    "window": {"min_snapshots": 2, "min_tokens": 1},
    "planner": {"interval_snapshots": 2},
}
SOURCE = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
TARGET = Placement(np.array([[0, 2, 1, 3]]), 4, 2)
MIGRATION = schedule(
    SOURCE,
    TARGET,
    TARGET.even_quotas_LP(),
    topology=Topology.single_node(2),
    expert_bytes_L=[8],
    pace=Pace.of_bytes(4),
    staging_slots=4,
)


class Driven:
    """Answers all that the loop asks for but snapshots, which the test gives.

    asked: the asks since the snapshot before. ended: what became of plans.
    """

    def __init__(
        self, *, replicated: bool = False, migration_of: Migration = MIGRATION, **sections: Any
    ) -> None:
        self._migration = migration_of
        self.loop = BalancingLoop(load_config(SETTINGS, sections), replicated=replicated)
        self.asked: list[Ask[Any]] = []
        self.ended: list[str] = []
        self._asks = self.loop.run()
        self._until_snapshot(None)

    def snapshot(self, agreed: Agreed = NOTHING_AGREED, *, tokens: int = 10) -> list[type]:
        """Give one; returns the kinds of what is asked for until the next one."""
        counts_ALE = np.full((2, 1, 4), tokens, dtype=np.int64)
        sample = LoadSample(counts_ALE=counts_ALE, steps=4, step_seconds=0.01)
        self._until_snapshot(Snapshot(sample=sample, agreed=agreed))
        return [type(asked) for asked in self.asked]

    def _until_snapshot(self, answer: Any) -> None:
        self.asked = []
        while True:
            asked = self._asks.send(answer)
            if isinstance(asked, NextSnapshot):
                return
            answer = self._migration if isinstance(asked, TakeRounds) else None
            if isinstance(asked, Tell):
                if isinstance(asked.event, PlanEnded):
                    self.ended.append(asked.event.outcome)
            else:
                self.asked.append(asked)

    def planned(self) -> None:
        """Until the plan is being made."""
        self.snapshot()
        assert self.snapshot() == [Propose]

    def proposed(self) -> None:
        """Until the rounds are being worked out."""
        self.planned()
        assert self.snapshot(Agreed(planned=True, proposed=True)) == [WorkOutRounds]


def test_a_plan_is_made_worked_out_and_carried_out() -> None:
    driven = Driven()
    assert driven.snapshot() == []
    assert driven.snapshot() == [Propose]
    assert driven.loop.activity == "planning"
    assert driven.snapshot() == []
    assert driven.snapshot(Agreed(planned=True, proposed=True)) == [WorkOutRounds]
    assert driven.snapshot() == []
    assert driven.snapshot(Agreed(scheduled=True)) == [TakeRounds, Migrate]
    assert driven.loop.activity == "watching"


def test_a_plan_is_made_from_the_window_and_told_what_is_new_in_it() -> None:
    driven = Driven()
    driven.planned()
    (first,) = driven.asked
    driven.snapshot(Agreed(planned=True))
    driven.snapshot()
    (second,) = driven.asked
    assert (len(first.samples), first.unseen) == (2, 2)
    assert (len(second.samples), second.unseen) == (4, 2)
    assert second.step_seconds == pytest.approx(0.01)


def test_a_refused_plan_ends_where_it_is() -> None:
    driven = Driven()
    driven.planned()
    assert driven.snapshot(Agreed(planned=True)) == []
    assert (driven.loop.activity, driven.ended) == ("watching", [])


@pytest.mark.parametrize(
    "sections",
    [
        {"mode": "observe"},
        {"mode": "static", "state": {"path": "x"}},
        {"planner": {"policy": "none"}},
    ],
)
def test_where_nothing_is_to_move_nothing_is_planned(sections: dict[str, Any]) -> None:
    driven = Driven(**sections)
    for _ in range(20):
        assert driven.snapshot(Agreed(plan_asked=True)) == []


def test_a_pause_lets_no_plan_begin() -> None:
    driven = Driven()
    for _ in range(10):
        assert driven.snapshot(Agreed(paused=True)) == []
    assert driven.snapshot(Agreed(paused=True, plan_asked=True)) == []
    assert driven.snapshot() == [Propose]


def test_a_pause_while_a_plan_is_made_gives_it_up() -> None:
    driven = Driven()
    driven.planned()
    assert driven.snapshot(Agreed(planned=True, proposed=True, paused=True)) == []
    assert driven.ended == ["abandoned"]


def test_a_pause_does_not_end_a_migration_that_was_decided_on() -> None:
    driven = Driven()
    driven.proposed()
    assert driven.snapshot(Agreed(scheduled=True, paused=True)) == [TakeRounds, Migrate]


def test_the_first_plan_waits_only_until_enough_was_seen() -> None:
    driven = Driven(planner={"interval_snapshots": 100})
    driven.planned()
    driven.snapshot(Agreed(planned=True))
    for _ in range(98):
        assert driven.snapshot() == []
    assert driven.snapshot() == [Propose]


@pytest.mark.parametrize("hurried", [True, False])
def test_after_a_plan_that_saves_much_the_next_follows_at_once(hurried: bool) -> None:
    pace = replace(Pace.of_bytes(4), hurried=hurried)
    driven = Driven(migration_of=replace(MIGRATION, pace=pace), planner={"interval_snapshots": 100})
    driven.proposed()
    assert driven.snapshot(Agreed(scheduled=True)) == [TakeRounds, Migrate]
    assert driven.snapshot() == ([Propose] if hurried else [])


def test_loaded_weights_are_planned_for_as_soon_as_at_the_start() -> None:
    driven = Driven(planner={"interval_snapshots": 100})
    driven.planned()
    driven.snapshot(Agreed(planned=True))
    driven.snapshot(Agreed(replaced=True, reloaded=(0,)))
    driven.planned()


def test_an_operator_need_not_wait_for_the_next_plan_but_for_traffic() -> None:
    driven = Driven(planner={"interval_snapshots": 100})
    assert driven.snapshot(Agreed(plan_asked=True), tokens=0) == []
    assert driven.snapshot(Agreed(plan_asked=True)) == [Propose]


def test_ranks_that_cannot_work_out_the_rounds_end_the_plan() -> None:
    driven = Driven()
    driven.proposed()
    assert driven.snapshot(Agreed(unscheduled_ranks=1)) == []
    assert driven.ended == ["failed"]


def test_a_migration_over_its_deadline_is_not_begun() -> None:
    driven = Driven(migration={"deadline_steps": 1})
    driven.proposed()
    assert driven.snapshot(Agreed(scheduled=True)) == [TakeRounds]
    assert driven.ended == ["over_budget"]


@pytest.mark.parametrize("state", ["watching", "planning", "scheduling"])
def test_replaced_weights_end_what_goes_on_and_empty_the_window(state: str) -> None:
    driven = Driven()
    {"watching": driven.snapshot, "planning": driven.planned, "scheduling": driven.proposed}[
        state
    ]()
    assert driven.snapshot(Agreed(replaced=True, reloaded=(0,))) == [ServeLoaded]
    assert driven.ended == ([] if state == "watching" else ["abandoned"])
    assert (driven.loop.activity, len(driven.loop.window)) == ("watching", 0)


def test_while_only_some_ranks_have_new_weights_no_plan_begins() -> None:
    driven = Driven()
    for _ in range(5):
        assert driven.snapshot(Agreed(replaced=True, plan_asked=True)) == []
    assert driven.snapshot() == [Propose]


def test_quotas_are_fitted_to_each_window_once_every_rank_has_the_ones_before() -> None:
    driven = Driven(replicated=True, planner={"policy": "none"})
    assert driven.snapshot() == [FitQuotas]
    assert driven.snapshot() == []
    assert driven.snapshot(Agreed(fitted=True)) == [TakeUpQuotas, FitQuotas]
    assert driven.snapshot(Agreed(fitted=True), tokens=0) == [TakeUpQuotas]
    assert driven.snapshot(tokens=0) == []
    assert driven.snapshot() == [FitQuotas]


def test_quotas_of_experts_that_move_are_forgotten() -> None:
    driven = Driven(replicated=True)
    driven.snapshot()
    driven.snapshot()
    driven.snapshot(Agreed(planned=True, proposed=True))
    driven.snapshot(Agreed(scheduled=True))
    assert TakeUpQuotas not in driven.snapshot(Agreed(fitted=True))


AGREED = st.builds(
    Agreed,
    planned=st.booleans(),
    proposed=st.booleans(),
    scheduled=st.booleans(),
    unscheduled_ranks=st.integers(0, 2),
    fitted=st.booleans(),
    paused=st.booleans(),
    plan_asked=st.booleans(),
    replaced=st.booleans(),
    reloaded=st.sampled_from([(), (0,)]),
).map(lambda agreed: replace(agreed, replaced=agreed.replaced or bool(agreed.reloaded)))


@settings(max_examples=200)
@given(st.lists(st.tuples(AGREED, st.sampled_from([0, 10])), max_size=40), st.booleans())
def test_whatever_ranks_agree_on_stages_follow_each_other(snapshots, replicated: bool) -> None:
    """A plan before rounds, rounds before a migration, quotas fitted before they are taken up."""
    driven = Driven(replicated=replicated)
    stages = [Propose, WorkOutRounds, TakeRounds, Migrate]
    at, fitting = 0, False
    for agreed, tokens in snapshots:
        for asked in driven.snapshot(agreed, tokens=tokens):
            if asked in stages:
                assert stages.index(asked) in (at, 0)
                at = (stages.index(asked) + 1) % len(stages)
                fitting = fitting and asked is not Migrate
            if asked in (FitQuotas, TakeUpQuotas):
                assert fitting is (asked is TakeUpQuotas)
                fitting = asked is FitQuotas
            if asked is ServeLoaded:
                assert agreed.reloaded
                fitting = False
