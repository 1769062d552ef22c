"""A replay: one scenario over a trace, snapshot by snapshot. Memory grows by a few numbers for each.

Letter of this module: `N` snapshots with tokens; others as in `placement.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import Record, RecordedPlacement, RecordedSnapshot, TraceHead
from ep_rebalance.migration.served import Served
from ep_rebalance.offline.balancing import PlanMade, ReplayedServer
from ep_rebalance.offline.eplb_settings import Eplb, import_policy
from ep_rebalance.offline.layouts import nothing_to_gain
from ep_rebalance.offline.peers import AsRecorded, Beginning, Contiguous, Hindsight, Peer, Serving
from ep_rebalance.offline.policies import REPLAY_POLICIES, SERVER_POLICIES
from ep_rebalance.offline.step_time import (
    MeasuredSteps,
    RankLoad,
    StepTime,
    recorded_by_own_counts,
)
from ep_rebalance.offline.traffic import Traffic
from ep_rebalance.offline.vllm_eplb import VllmEplb
from ep_rebalance.placement import Placement, can_be_shared, imbalance_L
from ep_rebalance.planning.cost_model import cost_model
from ep_rebalance.planning.problem import Planner
from ep_rebalance.planning.proposal import Proposer
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One way to serve the recorded load.

    policy: of REPLAY_POLICIES.
    planner: of a policy in SERVER_POLICIES; None for the others.
    config: also says how many redundant experts there are.
    topology: also says how many ranks there are.
    step_time: predicts step times.
    eplb: vLLM's balancer, for policy vllm-eplb; None for the others.
    """

    policy: str
    planner: Planner | None
    config: RebalanceConfig
    topology: Topology
    step_time: StepTime
    eplb: Eplb | None = None

    @property
    def by_own_counts(self) -> bool:
        """Whether tokens are counted before they are split."""
        as_configured = REPLAY_POLICIES[self.policy].splits_as_configured
        return as_configured and self.config.dispatch.by_own_counts

    @property
    def title(self) -> str:
        redundant = self.config.planner.redundant_experts
        return f"{self.policy}, EP{self.topology.num_ranks}, {redundant} redundant"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """What came out of a scenario.

    time_N: float64 [N]. Unix time.
    step_N: int64 [N]. The engine's number of the snapshot's last step.
    steps_N: int64 [N]. Steps of the snapshot.
    pairs_N: float64 [N]. (token, expert) pairs of all layers.
    imbalance_N: float64 [N]. Max over mean rank load, both summed over layers.
    balancedness_N: float64 [N]. Mean over max rank load, averaged over layers.
    seconds_N: float64 [N], seconds. Predicted mean step.
    home_N: float64 [N]. Fraction of the pairs that stay on their rank.
    node_N: float64 [N]. Fraction of the pairs that stay on their node, or even on their rank.
    share_LR: float64 [L, R]. Tokens of each rank over the layer's mean, over the whole trace.
    replicas_LE: int32 [L, E]. Replicas in the last placement.
    plans: all plans, in order.
    plan_seconds: wall time that each plan took here.
    """

    scenario: Scenario
    time_N: NDArray[np.float64]
    step_N: NDArray[np.int64]
    steps_N: NDArray[np.int64]
    pairs_N: NDArray[np.float64]
    imbalance_N: NDArray[np.float64]
    balancedness_N: NDArray[np.float64]
    seconds_N: NDArray[np.float64]
    home_N: NDArray[np.float64]
    node_N: NDArray[np.float64]
    share_LR: NDArray[np.float64]
    replicas_LE: NDArray[np.int32]
    plans: tuple[PlanMade, ...]
    plan_seconds: tuple[float, ...]

    @property
    def mean_step_seconds(self) -> float:
        """The mean over all steps of the trace."""
        return float(np.average(self.seconds_N, weights=self.steps_N))

    @property
    def mean_imbalance(self) -> float:
        """The mean over the tokens of the trace: busy snapshots count more."""
        return float(np.average(self.imbalance_N, weights=self.pairs_N))

    @property
    def mean_balancedness(self) -> float:
        """The mean over the snapshots of the trace."""
        return float(self.balancedness_N.mean())

    @property
    def home_share(self) -> float:
        """Fraction of all pairs of the trace that stay on their rank."""
        return float(np.average(self.home_N, weights=self.pairs_N))

    @property
    def node_share(self) -> float:
        """Fraction of all pairs of the trace that stay on their node, or even on their rank."""
        return float(np.average(self.node_N, weights=self.pairs_N))

    @property
    def commits(self) -> tuple[PlanMade, ...]:
        return tuple(plan for plan in self.plans if plan.outcome == "committed")

    @property
    def moved(self) -> int:
        """How many experts changed their slot."""
        return sum(plan.moved for plan in self.plans)

    @property
    def moved_bytes(self) -> int:
        """Bytes that went over links between ranks."""
        return sum(n for plan in self.plans for link, n in plan.bytes.items() if link != "local")

    @property
    def stall_seconds(self) -> float:
        """How long the engine stood still for experts on their way; no part of `seconds_N`."""
        return sum(plan.stall_seconds for plan in self.plans)

    @property
    def hours(self) -> float:
        """How long the trace would have been served, by the predicted step times."""
        return float(self.seconds_N @ self.steps_N) / 3600.0


class NothingRecorded(ValueError):
    """The trace holds no snapshot with tokens, or none of a step."""


NO_STEPS = "the trace says of no tokens that a step computed them; record it again"
"""Part of a snapshot may have none, but not all of them."""


def replay(
    head: TraceHead,
    records: Iterable[Record],
    scenario: Scenario,
    advance: Callable[[], None] = lambda: None,
) -> Replayed:
    """Serve the recorded snapshots as the scenario says.

    head: of the trace.
    advance: called after each snapshot.

    Raises ValueError if the slots do not divide by the ranks, NothingRecorded, and what reading the
    records raises.
    """
    if scenario.eplb:
        import_policy(scenario.eplb.policy)
    clocked = _Clocked(scenario.eplb.policy if scenario.eplb else scenario.planner)
    recorded, records = _beginning(records)
    as_recorded = _as_recorded(head, scenario)
    serving = _serving(head, scenario, clocked, recorded, as_recorded)
    served_before = AsRecorded(recorded.placement, scenario.config)
    own_before = recorded_by_own_counts(head)
    own = own_before if isinstance(serving, AsRecorded) else scenario.by_own_counts
    rows: list[tuple[float, ...]] = []
    sums_LR = np.zeros((head.layers, scenario.topology.num_ranks))
    for record in _announced(records, serving, scenario.config):
        if isinstance(record, RecordedPlacement):
            served_before.change(record)
            if isinstance(serving, AsRecorded):
                serving.change(record)
            continue
        served_before.snapshot(record)  # the step times in the trace are those of this placement
        counts_LE = record.counts_ALE.sum(axis=0, dtype=np.int64)
        was = _load(counts_LE, served_before, own_before)
        # Recorded times are kept if the replay decides as the server did, or decides nothing by them.
        timed = as_recorded or not isinstance(serving, ReplayedServer | VllmEplb)
        serving.snapshot(record if timed else _timed(record, scenario, serving, was))
        if counts_LE.any():
            served = _load(counts_LE, serving, own)
            seconds = scenario.step_time.seconds(record, served, was)
            traffic = Traffic.of(counts_LE, served.placement, served.quotas_LP, scenario.topology)
            rows.append(_row(record, served, seconds, traffic))
            sums_LR += served.tokens_LR
        advance()
    if not rows:
        raise NothingRecorded("the trace holds no snapshot with tokens; record while it serves")
    time_N, step_N, steps_N, *columns = (np.array(column) for column in zip(*rows, strict=True))
    if not steps_N.any():
        raise NothingRecorded(NO_STEPS)
    return Replayed(
        scenario=scenario,
        time_N=time_N,
        step_N=step_N.astype(np.int64),
        steps_N=steps_N.astype(np.int64),
        pairs_N=columns[0],
        imbalance_N=columns[1],
        balancedness_N=columns[2],
        seconds_N=columns[3],
        home_N=columns[4],
        node_N=columns[5],
        share_LR=sums_LR / np.maximum(sums_LR.mean(axis=1, keepdims=True), 1e-300),
        replicas_LE=serving.placement.replica_counts_LE(),
        plans=tuple(serving.plans),
        plan_seconds=tuple(clocked.seconds),
    )


def _timed(
    snapshot: RecordedSnapshot, scenario: Scenario, serving: Serving, recorded: RankLoad
) -> RecordedSnapshot:
    """The snapshot with the step time that decisions are based on: what a server would have measured on the
    placement that is served here, and on the scenario's hardware.
    """
    counts_LE = snapshot.counts_ALE.sum(axis=0, dtype=np.int64)
    served = _load(counts_LE, serving, scenario.by_own_counts)
    return replace(snapshot, step_seconds=scenario.step_time.seconds(snapshot, served, recorded))


def _load(counts_LE: NDArray[np.integer], serving: Serving, by_own_counts: bool) -> RankLoad:
    return RankLoad.of(counts_LE, serving.placement, serving.quotas_LP, by_own_counts=by_own_counts)


def _row(
    record: RecordedSnapshot, served: RankLoad, seconds: float, traffic: Traffic
) -> tuple[float, ...]:
    tokens_LR = served.tokens_LR
    balancedness = float(np.mean(1.0 / imbalance_L(tokens_LR)))
    mean = float(tokens_LR.mean(axis=1).sum())
    return (
        record.time,
        record.step,
        record.steps,
        float(tokens_LR.sum()),
        served.busiest / mean,
        balancedness,
        seconds,
        traffic.home_share,
        traffic.node_share,
    )


def plans(head: TraceHead, scenario: Scenario) -> bool:
    """Whether a replay makes plans with our planners: not where no placement is better than another."""
    ranks, redundant = scenario.topology.num_ranks, scenario.config.planner.redundant_experts
    of_policy = REPLAY_POLICIES[scenario.policy].plans
    return of_policy and not nothing_to_gain(head.experts, ranks, redundant)


def contiguous_placement(head: TraceHead, scenario: Scenario) -> Placement:
    """The placement that the engine would load. Raises ValueError if the ranks cannot share its slots, or not
    evenly where the policy moves experts.
    """
    ranks, redundant = scenario.topology.num_ranks, scenario.config.planner.redundant_experts
    slots, stays = head.experts + redundant, REPLAY_POLICIES[scenario.policy].as_loaded
    shared = can_be_shared(slots, head.experts, ranks) and (stays or slots % ranks == 0)
    if not shared or slots // ranks > head.experts:
        least = -head.experts % ranks
        loaded = ", ".join(name for name, policy in REPLAY_POLICIES.items() if policy.as_loaded)
        raise ValueError(
            f"{head.experts} experts and {redundant} redundant ones do not divide by {ranks} ranks; possible "
            f"are {least}, {least + ranks}, {least + 2 * ranks}, ... redundant ones, or another number of "
            f"ranks. Policies that move nothing ({loaded}) also serve without redundant ones"
        )
    return Placement.contiguous(
        num_layers=head.layers,
        num_experts=head.experts,
        num_ranks=ranks,
        num_redundant=redundant,
    )


class _Clocked:
    """A planner or an engine's policy, and the wall time of each plan."""

    def __init__(self, plan: Callable[..., Any] | None) -> None:
        self.seconds: list[float] = []
        self._plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._plan is not None
        began = time.perf_counter()
        planned = self._plan(*args, **kwargs)
        self.seconds.append(time.perf_counter() - began)
        return planned


def _beginning(records: Iterable[Record]) -> tuple[RecordedPlacement, Iterator[Record]]:
    """(the placement at the beginning, all records, including that one)."""
    iterator = iter(records)
    first = next(iterator, None)
    if not isinstance(first, RecordedPlacement):
        raise NothingRecorded("the trace does not begin with a placement")
    return first, chain([first], iterator)


_BALANCING = ("mode", "window", "planner", "hardware", "decision", "links", "migration")
"""The sections of the settings that plans depend on. A trace of an earlier version may lack others."""


def _as_recorded(head: TraceHead, scenario: Scenario) -> bool:
    """Whether the scenario is the recorded server's own, so that it takes the same decisions at the same
    moments; steps of another length lead to others.
    """
    # A trace of an earlier version lacks settings that came later. Before there were links, experts moved in
    # other batches.
    settings, recorded = scenario.config.as_dict(), load_config(head.config).as_dict()
    return (
        not head.origin
        and "links" in head.config
        and isinstance(scenario.step_time, MeasuredSteps)
        and list(scenario.topology.node_of_rank) == head.node_of_rank
        and all(settings[part] == recorded[part] for part in _BALANCING)
        and recorded_by_own_counts(head) == scenario.config.dispatch.by_own_counts
        and scenario.config.mode == "rebalance"
        and SERVER_POLICIES.get(scenario.policy) == scenario.config.planner.policy
    )


def _serving(
    head: TraceHead,
    scenario: Scenario,
    planner: Callable[..., Any],
    recorded: RecordedPlacement,
    as_recorded: bool,
) -> Serving:
    loaded = contiguous_placement(head, scenario)
    policy = REPLAY_POLICIES[scenario.policy]
    unplanned = policy.plans and not plans(head, scenario)
    if not policy.peer:
        served = Served.initial(loaded)
        if (loaded.num_slots, loaded.num_ranks) == (head.slots, head.ep_size):
            served = Served(
                placement=recorded.placement,
                quotas_LP=recorded.quotas_LP,
                generation=recorded.generation,
            )
        if unplanned:
            return Contiguous(served.placement)
        return _server(head, scenario, planner, served, loaded, as_recorded)
    if unplanned:
        return Contiguous(loaded)
    peer: type[Peer] = resolve_name(policy.peer)
    return peer.of(
        Beginning(
            recorded=recorded.placement,
            contiguous=loaded,
            config=scenario.config,
            topology=scenario.topology,
            expert_bytes_L=_expert_bytes_L(head),
            eplb=scenario.eplb and replace(scenario.eplb, policy=planner),
        )
    )


def _expert_bytes_L(head: TraceHead) -> list[int]:
    """Experts of unknown size count as a byte, so that no bound on bytes holds a migration up."""
    return head.expert_bytes if all(head.expert_bytes) else [1] * head.layers


def _server(
    head: TraceHead,
    scenario: Scenario,
    planner: Planner,
    served: Served,
    loaded: Placement,
    as_recorded: bool,
) -> ReplayedServer:
    config = with_planner(scenario.config, policy=SERVER_POLICIES[scenario.policy])
    expert_bytes_L = _expert_bytes_L(head)
    return ReplayedServer(
        config,
        proposer=Proposer(
            planner=planner,
            settings=config.planner,
            decision=config.decision,
            migration=config.migration,
            cost=cost_model(config),
            topology=scenario.topology,
            expert_bytes_L=expert_bytes_L,
            by_own_counts=config.dispatch.by_own_counts,
        ),
        topology=scenario.topology,
        expert_bytes_L=expert_bytes_L,
        served=served,
        loaded=loaded,
        as_recorded=as_recorded,
    )


def with_planner(config: RebalanceConfig, **changes: object) -> RebalanceConfig:
    """The settings with changes to their section `planner`, in a mode that plans."""
    planner = config.planner.model_copy(update=changes)
    return config.model_copy(update={"planner": planner, "mode": "rebalance"})


def _announced(
    records: Iterable[Record], serving: Serving, config: RebalanceConfig
) -> Iterator[Record]:
    """The records as they are. Hindsight is shown each interval's snapshots before they come, an interval
    being that between two plans.
    """
    if not isinstance(serving, Hindsight):
        yield from records
        return
    waiting: list[Record] = []
    coming: list[RecordedSnapshot] = []
    for record in records:
        waiting.append(record)
        if isinstance(record, RecordedSnapshot):
            coming.append(record)
        if len(coming) == config.planner.interval_snapshots:
            serving.expect(coming)
            yield from waiting
            waiting, coming = [], []
    if coming:
        serving.expect(coming)
    yield from waiting
