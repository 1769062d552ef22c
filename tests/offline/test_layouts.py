"""Where no placement is better than another, nothing is planned and the reason is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import run
from traces import head_of, records_of, write_trace

from ep_rebalance.commands import side_by_side
from ep_rebalance.config_sources import load_config
from ep_rebalance.offline.layouts import nothing_to_gain
from ep_rebalance.offline.policies import REPLAY_POLICIES, SERVER_POLICIES
from ep_rebalance.offline.run import Scenario, replay
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.policies import own_planners
from ep_rebalance.planning.problem import Problem
from ep_rebalance.topology import Topology

EXPERTS = 8
FIXED = [(1, 0), (8, 0), (2, 8), (4, 24)]
OTHERS = [(2, 0), (4, 0), (8, 8), (4, 4), (2, 2)]


def shuffled(ranks: int, redundant: int, random: np.random.Generator) -> Placement:
    """Any placement of these sizes, with each expert at most once on a rank."""
    slots = (EXPERTS + redundant) // ranks
    if slots == EXPERTS:
        rows = [random.permutation(EXPERTS) for _ in range(ranks)]
        return Placement(np.concatenate(rows)[None], EXPERTS, ranks)
    while True:
        experts_P = random.permutation(np.arange(EXPERTS + redundant) % EXPERTS)
        if all(len(set(held)) == slots for held in experts_P.reshape(ranks, slots).tolist()):
            return Placement(experts_P[None], EXPERTS, ranks)


def spread(ranks: int, redundant: int) -> float:
    """Between the least and the most imbalance of a hundred placements, on one load."""
    random = np.random.default_rng(0)
    load_LE = random.zipf(1.6, (1, EXPERTS)).clip(max=50)
    found = [
        imbalance_L(shuffled(ranks, redundant, random).rank_load_LR(load_LE))[0] for _ in range(100)
    ]
    return float(np.ptp(found))


@pytest.mark.parametrize(("ranks", "redundant"), FIXED)
def test_all_placements_of_a_fixed_layout_are_equally_even(ranks: int, redundant: int) -> None:
    assert nothing_to_gain(EXPERTS, ranks, redundant)
    assert spread(ranks, redundant) < 1e-9


@pytest.mark.parametrize(("ranks", "redundant"), OTHERS)
def test_in_other_layouts_it_matters_where_experts_sit(ranks: int, redundant: int) -> None:
    assert nothing_to_gain(EXPERTS, ranks, redundant) == ""
    assert spread(ranks, redundant) > 0.05


def test_ranks_with_unequally_many_slots_are_not_taken_for_those_with_one_each() -> None:
    assert nothing_to_gain(EXPERTS + 1, EXPERTS, 0) == ""


def planned(problem: Problem) -> Placement:
    raise AssertionError("a plan was made")


@pytest.mark.parametrize("policy", [*SERVER_POLICIES, "static", "hindsight"])
@pytest.mark.parametrize(("ranks", "redundant"), FIXED)
def test_a_fixed_layout_is_replayed_without_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, ranks: int, redundant: int
) -> None:
    monkeypatch.setattr("ep_rebalance.offline.peers.plan_incremental", planned)
    head = head_of(experts=EXPERTS, ranks=ranks, redundant=redundant, origin="generated")
    records = records_of(write_trace(tmp_path, head, 30))
    scenario = Scenario(
        policy=policy,
        planner=planned if policy in SERVER_POLICIES else None,
        config=load_config({"planner": {"redundant_experts": redundant}}),
        topology=Topology.single_node(ranks),
        step_time=MeasuredSteps(fraction=0.5),
    )
    one = replay(head, records, scenario)
    assert one.plans == ()
    assert len(one.step_N) == 30


def test_every_policy_that_plans_says_so() -> None:
    """So that no planner is left out when another one is added."""
    planning = {name for name, policy in REPLAY_POLICIES.items() if policy.plans}
    assert planning == {*SERVER_POLICIES, "static", "hindsight"}
    assert {*own_planners()} - {"none", "incremental"} <= planning


def test_the_command_compiles_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_planner() -> None:
        raise AssertionError("the planner was compiled")

    monkeypatch.setattr(side_by_side, "compile_planner", compile_planner)
    write_trace(tmp_path, head_of(experts=EXPERTS, ranks=2, origin="generated"), 20)
    words = []
    for size in ("1", "8"):
        done = run("replay", str(tmp_path), "--ep-size", size, "--jobs", "1", "--format", "table")
        assert done.exit_code == 0, done.output
        words.append(" ".join(done.stdout.split()))
    assert "because one rank computes everything" in words[0]
    assert words[0].count("leave it off. ") == 1
    assert "--redundant" not in words[0]
    assert "because each rank holds one expert of a layer and none has a replica" in words[1]
    assert "leave it off. More slots may help: replay with --redundant 8." in words[1]
    elsewhere = run("replay", str(tmp_path), "--jobs", "1")
    assert "was compiled" in str(elsewhere.exception)
