from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from traces import contiguous, head_of, records_of, snapshots, write_trace

from ep_rebalance.config import PlannerConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.snapshot import Agreed
from ep_rebalance.load.trace import (
    MigrationEnd,
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceReader,
    read_records,
)
from ep_rebalance.migration.served import Served
from ep_rebalance.offline.peers import AsRecorded
from ep_rebalance.offline.policies import REPLAY_POLICIES, SERVER_POLICIES
from ep_rebalance.offline.run import (
    NothingRecorded,
    Replayed,
    Scenario,
    contiguous_placement,
    replay,
)
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.offline.summary import summarise
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.planning.proposal import planned_load
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.telemetry.imbalance import RankBalance
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_planner")

HEAD = head_of(layers=3, experts=32, ranks=4, redundant=4, origin="generated")
SNAPSHOTS = 60
BY_TOKENS = {"decision": {"expert_time_fraction": 0.5}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace"), HEAD, SNAPSHOTS)


def scenario(policy: str, ranks: int = 4, redundant: int = 4, **settings: object) -> Scenario:
    planner = SERVER_POLICIES.get(policy)
    return Scenario(
        policy=policy,
        planner=planner_of(planner) if planner else None,
        config=load_config({"planner": {"redundant_experts": redundant}}, BY_TOKENS, settings),
        topology=Topology.single_node(ranks),
        step_time=MeasuredSteps(fraction=0.5),
    )


def replayed(path: Path, *args: object, **kwargs: object) -> Replayed:
    reader = TraceReader(path)
    return replay(reader.head, reader, scenario(*args, **kwargs))  # type: ignore[arg-type]


def test_rebalancing_lies_between_nothing_and_hindsight(path: Path) -> None:
    none, ours, best = (replayed(path, policy) for policy in ("none", "ours", "hindsight"))
    assert best.mean_imbalance < ours.mean_imbalance < none.mean_imbalance
    assert best.mean_balancedness > ours.mean_balancedness > none.mean_balancedness
    assert best.mean_step_seconds < ours.mean_step_seconds < none.mean_step_seconds
    assert ours.moved > 0
    assert none.moved == best.moved == 0
    assert ours.moved_bytes <= 1000 * ours.moved


def test_without_plugin_the_figures_are_those_of_the_contiguous_placement(path: Path) -> None:
    none = replayed(path, "none")
    expected = []
    for snapshot in snapshots(HEAD, SNAPSHOTS):
        rank_load = contiguous(HEAD).placement.rank_load_LR(snapshot.counts_ALE.sum(0))
        expected.append((1.0 / imbalance_L(rank_load)).mean())
    assert none.balancedness_N == pytest.approx(expected)
    assert none.seconds_N == pytest.approx([0.05] * SNAPSHOTS)
    assert none.share_LR.mean(axis=1) == pytest.approx([1.0] * 3)


def test_steps_are_scaled_by_their_busiest_ranks(path: Path) -> None:
    none, ours = replayed(path, "none"), replayed(path, "ours")
    expected = 0.05 * (0.5 + 0.5 * ours.imbalance_N / none.imbalance_N)
    assert ours.seconds_N == pytest.approx(expected)


def test_a_plan_takes_as_long_as_its_rounds(path: Path) -> None:
    quick = replayed(path, "ours")
    slow = replayed(path, "ours", migration={"max_bytes_per_step": 4096})
    first, late = quick.commits[0], slow.commits[0]
    assert (first.step, first.moved) == (late.step, late.moved)
    assert first.served_at is not None
    assert late.served_at is not None
    assert first.step + 2 * 16 < first.served_at <= late.served_at


def test_a_migration_without_end_is_over_budget(tmp_path: Path) -> None:
    path = write_trace(
        tmp_path, msgspec.structs.replace(HEAD, expert_bytes=[9000] * HEAD.layers), SNAPSHOTS
    )
    slow = replayed(path, "ours", migration={"max_bytes_per_step": 4096, "deadline_steps": 1})
    assert {plan.outcome for plan in slow.plans} == {"over_budget"}
    assert slow.moved == 0


def test_other_sizes_can_be_replayed(path: Path) -> None:
    ours = replayed(path, "ours", ranks=8, redundant=8)
    assert ours.share_LR.shape == (3, 8)
    assert ours.replicas_LE.sum() == 3 * 40
    with pytest.raises(ValueError, match=r"possible are 0, 8, 16"):
        contiguous_placement(HEAD, scenario("ours", ranks=8, redundant=4))


def test_placed_once_stays(path: Path) -> None:
    static, none = replayed(path, "static"), replayed(path, "none")
    assert static.mean_imbalance < none.mean_imbalance
    assert static.balancedness_N[:8] == pytest.approx(none.balancedness_N[:8], abs=0.1)
    assert static.plans == ()


def test_every_policy_runs(path: Path) -> None:
    for policy in REPLAY_POLICIES:
        if not REPLAY_POLICIES[policy].needs:
            assert len(replayed(path, policy).step_N) == SNAPSHOTS


def test_idle_snapshots_are_not_scored(tmp_path: Path) -> None:
    head = head_of()
    idle = list(snapshots(head, 3, pairs=0))
    busy = list(snapshots(head, 4))
    one = replay(head, [contiguous(head), *idle, *busy], scenario("ours", 2, 0))
    assert one.step_N.tolist() == [s.step for s in busy]
    with pytest.raises(NothingRecorded, match="no snapshot with tokens"):
        replay(head, [contiguous(head), *idle], scenario("none", 2, 0))
    with pytest.raises(NothingRecorded, match="begin with a placement"):
        replay(head, busy, scenario("none", 2, 0))
    stepless = [replace(one, steps=0) for one in busy]
    with pytest.raises(NothingRecorded, match="of no tokens that a step computed them"):
        replay(head, [contiguous(head), *stepless], scenario("none", 2, 0))
    assert replay(head, [contiguous(head), *stepless, *busy], scenario("none", 2, 0)).hours > 0.0


def test_what_was_served_is_scored_as_it_was(tmp_path: Path) -> None:
    head = head_of(layers=1, experts=4, ranks=2)
    counts = np.zeros((2, 1, 4), dtype=np.uint32)
    counts[0, 0] = [90, 10, 50, 50]
    (first, second) = (contiguous(head), contiguous(head, 1, 32))
    slots = np.array([[0, 2, 1, 3]], dtype=np.int32)
    moved = RecordedPlacement(
        placement=type(second.placement)(slots, 4, 2),
        quotas_LP=np.ones((1, 4)),
        generation=1,
        step=32,
        time=3.0,
    )
    fixed = [replace(snapshot, counts_ALE=counts) for snapshot in snapshots(head, 2)]
    one = replay(head, [first, fixed[0], moved, fixed[1]], scenario("recorded", 2, 0))
    assert one.imbalance_N.tolist() == pytest.approx([1.0, 1.4])


def test_quotas_of_what_was_served_are_those_of_no_file_s_beginning() -> None:
    """A server writes the placement again at the beginning of each file, with quotas of its own beginning."""
    head = head_of(redundant=2)
    records: list[Record] = []
    for number, snapshot in enumerate(snapshots(head, 30)):
        records += [contiguous(head)] if number % 10 == 0 else []
        records.append(replace(snapshot, agreed=Agreed(fitted=number > 0)))
    one = replay(head, records, scenario("recorded", 2, 2))
    once = [contiguous(head), *(r for r in records if isinstance(r, RecordedSnapshot))]
    assert one.imbalance_N == pytest.approx(
        replay(head, once, scenario("recorded", 2, 2)).imbalance_N
    )


def test_quotas_are_fitted_anew_after_a_migration_that_moved_nothing() -> None:
    """The server forgets those that it was fitting when a migration begins."""
    head = head_of(redundant=2)
    first, second, third = snapshots(head, 3)
    second = replace(
        second,
        counts_ALE=9 * second.counts_ALE[:, :, ::-1],
        ended=MigrationEnd(batches=0, abandoned=True),
    )
    third = replace(third, agreed=Agreed(fitted=True))
    served = AsRecorded(contiguous(head).placement, load_config())
    for snapshot in (first, second, third, third):
        served.snapshot(snapshot)
    load_LE = planned_load(PlannerConfig(), [first.sample(), second.sample()]).load_LE
    assert (served.quotas_LP == split_quotas(served.placement, load_LE)).all()


def test_tokens_split_by_own_counts_are_scored_as_the_server_showed_them() -> None:
    config = load_config({"planner": {"redundant_experts": 2}, "dispatch": {"split": "own_counts"}})
    plain = head_of(layers=1, experts=4, redundant=2)
    head = head_of(layers=1, experts=4, redundant=2, config=config.as_dict())
    placement = Placement(np.array([[0, 1, 2, 0, 1, 3]]), 4, 2)
    beginning = replace(contiguous(head), placement=placement, quotas_LP=placement.even_quotas_LP())
    counts = np.array([[[40, 40, 90, 10]], [[0, 0, 0, 0]]], dtype=np.uint32)
    (snapshot,) = (replace(one, counts_ALE=counts) for one in snapshots(head, 1))
    balance = RankBalance(placement, by_own_counts=True)
    balance.add(counts.astype(np.int64), Served.initial(placement))
    shown = balance.served.overall()
    assert shown == pytest.approx(1.0)
    # What was recorded stays as it was, whatever the settings of the replay.
    imbalances = [
        replay(its, [beginning, snapshot], scenario("recorded", 2, 2)).imbalance_N[0]
        for its in (head, plain)
    ]
    assert imbalances == pytest.approx([shown, 130 / 90])
    assert [summarise(its, [beginning, snapshot]).imbalance for its in (head, plain)] == imbalances


class LongSteps:
    """Of another machine than the recorded one."""

    def seconds(self, *_: object) -> float:
        return 0.05


def test_with_steps_of_another_length_a_plan_that_the_server_refused_is_carried_out() -> None:
    config = load_config({"planner": {"redundant_experts": 2}}, BY_TOKENS).as_dict()
    head = head_of(redundant=2, expert_bytes=[10**9] * 2, config=config)
    refused = Agreed(planned=True, fitted=True)
    records = [
        contiguous(head),
        *(replace(s, step_seconds=1e-9, agreed=refused) for s in snapshots(head, 80)),
    ]
    recorded = Scenario(
        policy="ours",
        planner=planner_of("incremental"),
        config=load_config(head.config),
        topology=Topology.single_node(2),
        step_time=MeasuredSteps(fraction=0.5),
    )
    assert {plan.outcome for plan in replay(head, records, recorded).plans} == {"over_budget"}
    one = replay(head, records, replace(recorded, step_time=LongSteps()))
    assert one.commits
    assert "failed" not in {plan.outcome for plan in one.plans}


def test_several_files_are_one_trace(path: Path, tmp_path: Path) -> None:
    parts = records_of(path)
    halves = [parts[:31], [parts[0], *parts[31:]]]
    whole = replayed(path, "ours")
    joined = replay(HEAD, [r for half in halves for r in half], scenario("ours"))
    assert [p.moved for p in joined.plans] == [p.moved for p in whole.plans]
    assert joined.imbalance_N == pytest.approx(whole.imbalance_N)
    other = write_trace(tmp_path, head_of(experts=16), 2)
    with pytest.raises(ValueError, match="replay them apart"):
        list(read_records([TraceReader(path), TraceReader(other)]))
