"""A trace, replayed with the settings of the server that recorded it, comes to what the server served."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from balanced_engine import (
    DTYPE,
    EXPERTS,
    LAYERS,
    SHAPES,
    STEPS_LIMIT,
    Engine,
    Inline,
    eager,
    spoil_votes,
)
from expert_weights import loaded, memory_of
from ranks import Ranks
from reloading_engine import ReloadingEngine
from traces import head_of

from ep_rebalance.balancer import jobs, rebalancer
from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceHead, TraceReader
from ep_rebalance.offline import balancing
from ep_rebalance.offline.balancing import ReplayedServer
from ep_rebalance.offline.run import Replayed, Scenario, replay
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.placement import Placement
from ep_rebalance.planning import pace
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_planner")


def head_for(size: int, config: RebalanceConfig) -> TraceHead:
    return head_of(
        layers=LAYERS,
        experts=EXPERTS,
        ranks=size,
        redundant=config.planner.redundant_experts,
        expert_bytes=list(memory_of(loaded_anywhere(size, config)).expert_bytes_L),
        config=config.as_dict(),
    )


def replayed_as_recorded(folder: Path, policy: str = "ours") -> Replayed:
    reader = TraceReader(*folder.glob("*.eptrace"))
    scenario = Scenario(
        policy=policy,
        planner=planner_of("incremental"),
        config=load_config(reader.head.config),
        topology=Topology.single_node(2),
        step_time=MeasuredSteps(fraction=0.5),
    )
    return replay(reader.head, reader, scenario)


def rebalance_recorded(rank, size, config, executor):
    recorder = Recorder(config.trace, head_for(size, config)) if rank == 0 else None
    engine = Engine(rank, size, config, executor=executor, recorder=recorder)
    for step in range(STEPS_LIMIT):
        engine.step(skew=2.0 if step < STEPS_LIMIT // 2 else -1.0)
    if recorder is not None:
        recorder.flush()
    return engine.rebalancer.served, engine.rebalancer.status


def loaded_anywhere(size, config):
    placement = Placement.contiguous(
        num_layers=LAYERS,
        num_experts=EXPERTS,
        num_ranks=size,
        num_redundant=config.planner.redundant_experts,
    )
    return loaded(placement, 0, DTYPE, SHAPES)


@pytest.mark.parametrize("executor", [Inline, ThreadPoolExecutor])
@pytest.mark.parametrize("redundant", [0, 4])
def test_a_trace_replays_to_the_placements_that_were_served(
    two_ranks: Ranks, tmp_path: Path, executor, redundant
):
    config = eager({"planner": {"redundant_experts": redundant}, "trace": {"path": str(tmp_path)}})
    (served, status), _ = two_ranks.run(rebalance_recorded, 2, config, executor)
    replayed, reader = replayed_as_recorded(tmp_path), TraceReader(*tmp_path.glob("*.eptrace"))
    recorded = {r.generation: r for r in reader if isinstance(r, RecordedPlacement)}
    assert served.generation >= 3
    assert [plan.generation for plan in replayed.commits] == list(recorded)[1:]
    for plan in replayed.commits:
        placement = recorded[plan.generation].placement
        assert plan.placement == placement
        assert plan.moved == placement.changed_slots(recorded[plan.generation - 1].placement)
    refused = [plan.outcome for plan in replayed.plans].count("no_gain")
    assert status.plans["no_gain"] - refused in (0, 1), "the last one may not be recorded yet"


@contextmanager
def few_bytes_fit(owner: object, name: str) -> Iterator[list[Pace]]:
    """So small a share of a step is for experts that its bytes depend on how long steps take. Collects the
    pace of each call of `owner.name`.
    """
    paces: list[Pace] = []
    function = getattr(owner, name)

    def noted(*args, **kwargs):
        paces.append(kwargs.get("pace") or args[1].migration.pace)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "USUAL_SHARE", 1e-6)
        patch.setattr(pace, "MOST_SHARE", 3e-5)
        patch.setattr(pace, "LEAST_BYTES", 1)
        patch.setattr(owner, name, noted)
        yield paces


def rebalance_at_a_fitting_pace(rank, size, config):
    """Each rank has step times of its own."""
    with few_bytes_fit(Migrator, "migrate") as paces, pytest.MonkeyPatch.context() as patch:
        clock = Clock(rank)
        patch.setattr(rebalancer, "time", clock)
        recorder = Recorder(config.trace, head_for(size, config)) if rank == 0 else None
        engine = Engine(rank, size, config, recorder=recorder)
        for _ in range(STEPS_LIMIT):
            clock.pass_step()
            engine.step(continues=True)
        if recorder is not None:
            recorder.flush()
    return engine.rebalancer.served.generation, paces


def test_all_ranks_and_a_replay_go_at_the_same_fitting_pace(two_ranks: Ranks, tmp_path: Path):
    config = eager({"migration": {"max_bytes_per_step": "auto"}, "trace": {"path": str(tmp_path)}})
    (generation, ours), (_, theirs) = two_ranks.run(rebalance_at_a_fitting_pace, 2, config)
    assert ours == theirs
    assert generation >= 2
    assert all(5900 < one.max_bytes < 6100 for one in ours)  # 3e-5 of 10 ms over 20 GB/s
    assert len({one.max_bytes for one in ours}) > 1
    with few_bytes_fit(balancing, "schedule_as_configured") as replayed:
        replayed_as_recorded(tmp_path)
    assert replayed[: len(ours)] == ours


class Clock:
    """Steps take the same time on every placement, but for a little that comes and goes."""

    def __init__(self, rank: int) -> None:
        self._now, self._rng = 0.0, np.random.default_rng(rank)

    def perf_counter(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now

    def pass_step(self) -> None:
        self._now += 0.01 * (1 + 0.001 * self._rng.normal())


def rebalance_to_no_avail(rank, size, config):
    clock = Clock(rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebalancer, "time", clock)
        patch.setattr(jobs, "time", clock)
        recorder = Recorder(config.trace, head_for(size, config)) if rank == 0 else None
        engine = Engine(rank, size, config, recorder=recorder)
        for _ in range(STEPS_LIMIT):
            clock.pass_step()
            engine.step(continues=True)
    if recorder is not None:
        recorder.flush()
    return engine.rebalancer.status_now()


def test_a_replay_judges_by_the_recorded_step_times_as_the_server_did(
    two_ranks: Ranks, tmp_path: Path
):
    config = eager(
        {
            "window": {"min_snapshots": 8},  # so that step times before the first commit are known
            "decision": {"min_gain": 0.001},
            "trace": {"path": str(tmp_path)},
        }
    )
    status, _ = two_ranks.run(rebalance_to_no_avail, 2, config)
    told = [commit for commit in status.commits if commit.measured_gain is not None]
    assert told
    assert all(abs(c.measured_gain) < 4 * c.measured_gain_error < 0.01 for c in told)
    assert any(c.achieved_gain > 4 * c.measured_gain_error for c in told)
    replayed = [
        (plan.generation, plan.predicted_gain) for plan in replayed_as_recorded(tmp_path).commits
    ]
    served = [(commit.generation, commit.predicted_gain) for commit in status.commits]
    assert replayed == served[: len(replayed)]
    assert len(served) - len(replayed) <= 1  # the last may have ended after the last snapshot


class WaitingClock(Clock):
    """Steps of which a part waits for the busiest ranks of the load that the engine has."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.engine: Engine | None = None
        self.skew = 2.0

    def pass_step(self) -> None:
        super().pass_step()
        assert self.engine is not None
        served = self.engine.rebalancer.served
        popularity_LE = np.tile(np.exp(self.skew * np.linspace(1, 0, EXPERTS)), (LAYERS, 1))
        load_LR = served.placement.rank_load_LR(popularity_LE, served.quotas_LP)
        self._now += 0.01 * load_LR.max(axis=1).sum() / load_LR.mean(axis=1).sum()


def rebalance_and_learn(rank, size, config):
    """The status, and what each proposal took the experts' part of a step to be."""
    clock = WaitingClock(rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebalancer, "time", clock)
        patch.setattr(jobs, "time", clock)
        recorder = Recorder(config.trace, head_for(size, config)) if rank == 0 else None
        clock.engine = Engine(rank, size, config, recorder=recorder)
        told, status = [], clock.engine.rebalancer.status
        for step in range(STEPS_LIMIT):
            clock.skew = 2.0 if step // 40 % 2 else -1.0
            clock.pass_step()
            clock.engine.step(continues=True, skew=clock.skew)
            if status.expert_time and (not told or told[-1] != status.expert_time):
                told.append(dict(status.expert_time))
    if recorder is not None:
        recorder.flush()
    return clock.engine.rebalancer.status_now(), told


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_replay_learns_from_the_recorded_step_times_what_the_server_did(
    two_ranks: Ranks, tmp_path: Path, redundant
):
    config = eager(
        {
            "planner": {"redundant_experts": redundant},
            "decision": {"expert_time_fraction": "auto"},
            "trace": {"path": str(tmp_path)},
        }
    )
    (status, told), _ = two_ranks.run(rebalance_and_learn, 2, config)
    assert status.expert_time_learned
    assert len(told) > 20
    replayed = []
    for plan in replayed_as_recorded(tmp_path).plans:
        low, high = plan.expert_time.bounds
        seen = {"low": low, "estimate": plan.expert_time.fraction, "high": high}
        if not replayed or replayed[-1] != seen:
            replayed.append(seen)
    for ours, theirs in zip(replayed, told, strict=False):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert len(told) - len(replayed) in (0, 1), "the last one may not be recorded yet"


# --- pauses, requests, migrations that are given up, weights that are replaced


@dataclass(frozen=True)
class ServedThen:
    """What a snapshot was served with."""

    generation: int
    slots_LP: list
    quotas_LP: np.ndarray


EVENTS = {
    30: "pause",
    70: "resume",
    100: "rebalance",
    150: "reload",
    190: "pause",
    191: "resume",
    240: "reload some layers",
    300: "pause",
    330: "resume",
    331: "rebalance",
}
"""What happens before which step."""


def what_was_served(recorder: Recorder) -> list[ServedThen]:
    """Grows with each snapshot that `recorder` is given."""
    seen, record = [], recorder.snapshot

    def noted(snapshot, served, step, ended):
        slots_LP, quotas_LP = served.placement.slots_LP.tolist(), served.quotas_LP
        seen.append(ServedThen(served.generation, slots_LP, quotas_LP))
        record(snapshot, served, step, ended)

    recorder.snapshot = noted
    return seen


def serve_through_everything(rank, size, config, executor, spoilt):
    recorder = Recorder(config.trace, head_for(size, config)) if rank == 0 else None
    seen = what_was_served(recorder) if recorder else []
    engine = ReloadingEngine(rank, size, config, executor=executor, recorder=recorder)
    spoil_votes(engine, spoilt)
    for step in range(STEPS_LIMIT):
        event = EVENTS.get(step, "")
        if event == "reload":
            engine.reload()
        elif event:
            engine.reload((0, 2)) if "reload" in event else engine.rebalancer.ask(event)
        engine.step(skew=2.0 if step // 50 % 2 else -1.0)
    if recorder:
        recorder.flush()
    return seen, engine.rebalancer.status_now()


def imbalances(reader: TraceReader, served: list[ServedThen]) -> list[float]:
    """Of each snapshot, busiest ranks over mean."""
    ratios = []
    snapshots = (record for record in reader if isinstance(record, RecordedSnapshot))
    for snapshot, then in zip(snapshots, served, strict=True):
        placement = Placement(np.array(then.slots_LP), EXPERTS, 2)
        load_LE = snapshot.counts_ALE.sum(axis=0, dtype=np.float64)
        tokens_LR = placement.rank_load_LR(load_LE, then.quotas_LP)
        ratios.append(tokens_LR.max(axis=1).sum() / tokens_LR.mean(axis=1).sum())
    return ratios


def replayed_snapshots(folder: Path) -> tuple[list[ServedThen], Replayed]:
    seen, snapshot = [], ReplayedServer.snapshot

    def noted(server, recorded):
        snapshot(server, recorded)
        slots_LP, quotas_LP = server.placement.slots_LP.tolist(), server.quotas_LP
        seen.append(ServedThen(server._served.generation, slots_LP, quotas_LP))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplayedServer, "snapshot", noted)
        return seen, replayed_as_recorded(folder)


@pytest.mark.parametrize("executor", [Inline, ThreadPoolExecutor])
@pytest.mark.parametrize("redundant", [0, 4])
def test_a_replay_pauses_asks_abandons_and_reloads_as_the_server_did(
    two_ranks: Ranks, tmp_path: Path, executor, redundant
):
    config = eager(
        {
            "planner": {
                "redundant_experts": redundant,
                "max_arrivals_per_rank_and_layer": 1,
                "max_moved_fraction": 1.0,
            },
            "trace": {"path": str(tmp_path)},
        }
    )
    job = (serve_through_everything, 2, config, executor, (2, 3))
    (served, status), _ = two_ranks.run(*job, timeout=120)
    assert status.plans["abandoned"] >= 2
    assert status.plans["committed"] >= 2
    assert status.weight_reloads == 2
    replayed, result = replayed_snapshots(tmp_path)
    assert len(replayed) == len(served)
    for ours, theirs in zip(replayed, served, strict=True):
        assert ours.slots_LP == theirs.slots_LP
        assert np.abs(ours.quotas_LP - theirs.quotas_LP).max() < 1e-8  # a plan's travel as integers
    outcomes = [plan.outcome for plan in result.plans]
    for outcome in ("committed", "abandoned", "failed", "over_budget"):
        assert status.plans[outcome] - outcomes.count(outcome) in (0, 1), outcome
    right = imbalances(TraceReader(*tmp_path.glob("*.eptrace")), served)
    assert result.imbalance_N == pytest.approx(right)
    recorded = replayed_as_recorded(tmp_path, policy="recorded")
    # Quotas that come with a plan that moves nothing are in no record, so a few snapshots may differ.
    assert np.isclose(recorded.imbalance_N, right, rtol=0.05).mean() > 0.95
    moved = {plan.generation: plan.moved for plan in result.plans}
    reloaded = {then.generation for then in served} - {0, *moved}
    assert len(reloaded) == 2
    for commit in status.commits[:-1]:
        # Of experts that a reload overtakes between vote and commit only the placement is committed.
        if commit.generation + 1 not in reloaded:
            assert commit.experts == moved[commit.generation]
