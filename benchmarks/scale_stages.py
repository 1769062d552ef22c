"""The stages that scale.py times, each made for one number of ranks from the code that a server runs."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry, generate_latest

from ep_rebalance.all_to_all.exact_splits import ExactSplits
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.collectives.link_speed import ring
from ep_rebalance.collectives.plan_broadcast import PlanBroadcast, read_plan
from ep_rebalance.collectives.snapshot import Flags, SnapshotExchange
from ep_rebalance.config import MetricsConfig, RebalanceConfig
from ep_rebalance.engines.vllm.seams import rank_agreement
from ep_rebalance.load.snapshot import NOTHING_AGREED, Snapshot
from ep_rebalance.load.state import (
    FORMAT,
    FORMAT_VERSION,
    Header,
    ModelIdentity,
    SavedState,
    save_state,
)
from ep_rebalance.load.step_times import StepSum
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.load.window import LoadSample, window_load
from ep_rebalance.migration import Batch, schedule
from ep_rebalance.migration.commit import PreparedMigration, Split, commit_batch
from ep_rebalance.migration.configured import schedule_as_configured
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.migration.served import Served
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps, synthetic_domains
from ep_rebalance.offline.model_shape import ModelShape
from ep_rebalance.offline.traffic import Traffic
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.decision import decide
from ep_rebalance.planning.expert_time import ExpertTimeEstimate
from ep_rebalance.planning.pace import Pace, Transport
from ep_rebalance.planning.policies import make_plan, planner_of
from ep_rebalance.planning.problem import Problem
from ep_rebalance.planning.proposal import plan_budget, planned_load
from ep_rebalance.routing.device_tables import DispatchTables, RoutingTables
from ep_rebalance.telemetry.events import BatchCommitted, SnapshotTaken
from ep_rebalance.telemetry.file_health import FileHealth
from ep_rebalance.telemetry.imbalance import BalanceThread, RankBalance
from ep_rebalance.telemetry.journal import Journal, initial_status
from ep_rebalance.telemetry.metrics import Status, encode
from ep_rebalance.telemetry.prometheus import Exporter
from ep_rebalance.telemetry.whole_pipeline import whole_report
from ep_rebalance.topology import Topology
from ep_rebalance.version import __version__, source_digest

LEAST_REDUNDANT, LEAST_SLOTS = 32, 2
"""Redundant experts of a layer, and slots of a rank, in a deployment of any size."""
RANKS_PER_NODE = 8
STEP_SECONDS = 0.03
HIDDEN = 64
"""Columns of hidden states: their bytes are the links' work, too."""
EXPERT_BYTES = 1 << 10
"""Of the experts that this process really holds: their bytes cost links and memory, and not the host."""

STEP, POLL, BESIDE, PLANNER, SERVER, START, OFFLINE = (
    "every step",
    "when asked",
    "balance thread",
    "planner thread",
    "API server",
    "start",
    "offline",
)
SNAPSHOT, MIGRATION = "a snapshot", "a migration"
"""Steps that begin or end a snapshot, and those that move experts."""
ON_THE_STEP_PATH = (STEP, SNAPSHOT, MIGRATION, POLL)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Something that one rank does.

    where: in which steps, or in which thread or process.
    run: does it once. size: bytes that it sends, keeps or returns; None where there is nothing to say.
    before: what has to be done before each time, not timed.
    times: how often a step does it.
    """

    name: str
    where: str
    run: Callable[[], object]
    times: int = 1
    size: int | None = None
    before: Callable[[], object] | None = None


def redundant_experts(shape: ModelShape, ranks: int) -> int:
    """As few as fill all ranks alike."""
    slots = max(LEAST_SLOTS, -(-(shape.experts + LEAST_REDUNDANT) // ranks))
    return ranks * slots - shape.experts


class Deployment:
    """One rank of many, with its load, a plan and a migration."""

    def __init__(self, shape: ModelShape, ranks: int, tokens: int, folder: Path) -> None:
        self.shape, self.ranks, self.folder = shape, ranks, folder
        self.group = dist.new_group(list(range(ranks)))
        self.topology = Topology.node_by_node(ranks, RANKS_PER_NODE)
        redundant = redundant_experts(shape, ranks)
        self.placement = Placement.contiguous(
            num_layers=shape.layers,
            num_experts=shape.experts,
            num_ranks=ranks,
            num_redundant=redundant,
        )
        self.config = RebalanceConfig.model_validate(
            {"planner": {"redundant_experts": redundant}, "dispatch": {"split": "own_counts"}}
        )
        self.served = Served.initial(self.placement)
        self.by_quotas, self.by_own_counts = (
            self._tables(tokens, own_counts) for own_counts in (False, True)
        )
        slots = self.placement.slots_per_rank
        weights = [[torch.zeros(slots, EXPERT_BYTES // 4)] for _ in range(shape.layers)]
        self.memory = ExpertMemory(weights)
        self.samples = list(islice(self._load(tokens), self.config.window.snapshots))
        self.load = planned_load(self.config.planner, self.samples)
        self.expert_bytes_L = [shape.expert_bytes] * shape.layers
        self.transport = Transport(
            settings=self.config.migration,
            topology=self.topology,
            expert_bytes_L=self.expert_bytes_L,
            step_seconds=STEP_SECONDS,
        )
        self.plan = self.make_plan()
        self.pace = self.transport.pace(self.plan, self.placement, 0.05)

    def _tables(self, tokens: int, own_counts: bool) -> RoutingTables:
        return RoutingTables(
            placement=self.placement,
            max_tokens=tokens,
            device=torch.device("cpu"),
            topology=self.topology,
            rank=0,
            by_own_counts=own_counts,
        )

    def _load(self, tokens: int) -> Iterator[LoadSample]:
        """The snapshots of all ranks: each brings `tokens` in a step."""
        domains_DLE = synthetic_domains(
            domains=4, layers=self.shape.layers, experts=self.shape.experts, seed=0
        )
        steps = self.config.window.snapshot_steps
        pairs = tokens * steps * self.ranks * self.shape.top_k
        for counts_LE in generate_steps(
            domains_DLE, TIMINGS["steady"], pairs_per_step=pairs, seed=0
        ):
            yield LoadSample(
                counts_ALE=np.stack([counts_LE // 2, counts_LE - counts_LE // 2]),
                steps=steps,
                step_seconds=STEP_SECONDS,
                generation=0,
                placement=self.placement,
                quotas_LP=self.served.quotas_LP,
            )

    def problem(self) -> Problem:
        """What the planner is given."""
        settings = self.config.planner
        return Problem(
            load=self.load,
            current=self.placement,
            topology=self.topology,
            budget=plan_budget(settings, self.placement),
            internode_token_price=settings.internode_token_price,
        )

    def make_plan(self) -> Any:
        """A plan with its quotas and its promise."""
        return make_plan(planner_of("incremental"), self.problem())

    def rounds(self, rank: int | None = 0) -> Any:
        """The migration to the plan, with the model's real experts."""
        return schedule_as_configured(
            self.config,
            self.placement,
            self.plan.placement,
            self.plan.quotas_LP,
            topology=self.topology,
            pace=self.pace,
            expert_bytes_L=self.expert_bytes_L,
            rank=rank,
        )


def stages(deployment: Deployment) -> list[Stage]:
    """All stages of a deployment, in the order of the table."""
    return [
        *_routing(deployment),
        *_snapshot(deployment),
        *_migration(deployment),
        *_reports(deployment),
        *_balance_thread(deployment),
        *_planner_thread(deployment),
        *_start(deployment),
        Stage(
            name="traffic of a load (replay)",
            where=OFFLINE,
            run=lambda: Traffic.of(
                deployment.samples[0].load_LE,
                deployment.placement,
                deployment.served.quotas_LP,
                deployment.topology,
            ).copies_LR(deployment.shape.top_k),
        ),
    ]


def _routing(d: Deployment) -> list[Stage]:
    rng = np.random.default_rng(0)
    tokens = d.by_quotas.phase_T.numel()
    share_E = d.samples[0].load_LE[0] / d.samples[0].load_LE[0].sum()
    ids_TK = torch.from_numpy(rng.choice(d.shape.experts, (tokens, d.shape.top_k), p=share_E))
    phases_T = np.ones(tokens, dtype=np.int8)
    for tables in (d.by_quotas, d.by_own_counts):
        tables.set_dispatch(range(d.shape.layers), d.placement, d.served.quotas_LP)

    def marked() -> None:
        d.by_quotas.mark_tokens(phases_T)
        d.by_quotas.end_step()

    return [
        Stage(name="mark and forget a step's tokens", where=STEP, run=marked, size=8 + tokens),
        Stage(
            name="route by quotas, all layers",
            where=STEP,
            times=d.shape.layers,
            run=lambda: d.by_quotas.route(0, ids_TK, 0),
            size=_bytes_of(d.by_quotas),
        ),
        Stage(
            name="route by own counts, all layers",
            where=STEP,
            times=d.shape.layers,
            run=lambda: d.by_own_counts.route(0, ids_TK, 0),
            size=_bytes_of(d.by_own_counts),
        ),
        Stage(
            name="our all-to-all, all layers",
            where=STEP,
            times=d.shape.layers,
            run=_our_all_to_all(d, ids_TK),
        ),
    ]


def _bytes_of(tables: RoutingTables) -> int:
    """Of the tables of all layers."""
    layers, pours = tables.layers[0], tables.pours[0]
    parts = [layers.replica_slots_EC, layers.thresholds_EC]
    parts += [pours.poured_X, pours.colour_X, pours.row_E, pours.ground_R]
    return len(tables.layers) * sum(part.nbytes for part in parts)


def _our_all_to_all(d: Deployment, ids_TK: torch.Tensor) -> Callable[[], None]:
    """A layer's dispatch and combine. What a rank sends comes back to it, so that it has rows to unpack."""
    exchange = ExactSplits(
        group=d.group, slots_per_rank=d.placement.slots_per_rank, combine="exact"
    )
    slots_TK = d.by_quotas.route(0, ids_TK, 0)
    hidden_TH = torch.zeros(len(ids_TK), HIDDEN)
    weights_TK = torch.ones(ids_TK.shape, dtype=torch.float32)
    out_TH = torch.zeros_like(hidden_TH)

    def send_back(out: torch.Tensor, sent: torch.Tensor, *_: object, **__: object) -> None:
        if out.shape == sent.shape:
            out.copy_(sent)
        else:
            out.zero_()

    def exchanged() -> None:
        with mock.patch.object(dist, "all_to_all_single", send_back):
            dispatched = exchange.dispatch(hidden_TH, slots_TK, weights_TK)
            outputs_NH = torch.zeros(len(dispatched.local_slots_N), HIDDEN)
            exchange.combine(dispatched, outputs_NH, out_TH)

    return exchanged


def _snapshot(d: Deployment) -> list[Stage]:
    exchange = SnapshotExchange(group=d.group, counts=d.by_quotas)
    balance = BalanceThread(RankBalance(d.placement))
    split = d.by_own_counts.dispatch_tables(d.placement, d.served.quotas_LP, d.load.load_LE)
    recorder, record_bytes = _recorder(d)
    snapshot = Snapshot(sample=d.samples[0], agreed=NOTHING_AGREED)

    def begin() -> None:
        exchange.begin(Flags(), StepSum())

    return [
        Stage(
            name="begin a snapshot",
            where=SNAPSHOT,
            run=begin,
            size=8 * exchange._buffer.numel(),
        ),
        Stage(name="finish a snapshot", where=SNAPSHOT, run=lambda: exchange.finish(0)),
        Stage(
            name="hand over to the balance of ranks",
            where=SNAPSHOT,
            before=balance.caught_up,
            run=lambda: balance.add(d.samples[0].counts_ALE, d.served),
        ),
        Stage(
            name="hand over a record of the trace",
            where=SNAPSHOT,
            before=recorder.flush,
            run=lambda: recorder.snapshot(snapshot, d.served, 0, None),
            size=record_bytes,
        ),
        Stage(
            name="take up a new split",
            where=SNAPSHOT,
            run=lambda: d.by_own_counts.split(split),
            size=_bytes_of_split(split),
        ),
    ]


def _balance_thread(d: Deployment) -> list[Stage]:
    by_quotas, by_own_counts = (
        RankBalance(d.placement, by_own_counts=own_counts) for own_counts in (False, True)
    )
    counts_ALE, moved = d.samples[0].counts_ALE, replace(d.served, generation=1)
    size = 8 * d.shape.layers * d.ranks
    return [
        Stage(
            name="add to the balance, by quotas",
            where=BESIDE,
            run=lambda: by_quotas.add(counts_ALE, d.served),
            size=size,
        ),
        Stage(
            name="add to the balance, after a commit",
            where=BESIDE,
            before=lambda: by_quotas.add(counts_ALE, moved),
            run=lambda: by_quotas.add(counts_ALE, d.served),
            size=size,
        ),
        Stage(
            name="add to the balance, by own counts",
            where=BESIDE,
            run=lambda: by_own_counts.add(counts_ALE, d.served),
            size=size,
        ),
    ]


def _bytes_of_split(tables: DispatchTables) -> int:
    ground = 0 if tables.ground_LR is None else tables.ground_LR.nbytes
    return tables.thresholds_LEC.nbytes + ground


def _journal(d: Deployment, own_counts: bool) -> Journal:
    status = initial_status(
        config=d.config,
        model=d.shape.title,
        placement=d.placement,
        top_k=d.shape.top_k,
        topology=d.topology,
    )
    return Journal(
        status,
        contiguous=d.placement,
        top_k=d.shape.top_k,
        rank=0,
        by_own_counts=own_counts,
    )


def _recorder(d: Deployment) -> tuple[Recorder, int]:
    head = TraceHead(
        model=d.shape.title,
        layers=d.shape.layers,
        experts=d.shape.experts,
        top_k=d.shape.top_k,
        ep_size=d.ranks,
        slots=d.placement.num_slots,
        node_of_rank=list(d.topology.node_of_rank),
        expert_bytes=d.expert_bytes_L,
        hidden_size=d.shape.hidden_size,
        engine="",
        plugin_version="",
        started=time.time(),
        config=d.config.as_dict(),
    )
    folder = Path(tempfile.mkdtemp(dir=d.folder))
    recorder = Recorder(d.config.trace.model_copy(update={"path": str(folder)}), head)
    recorder.snapshot(Snapshot(sample=d.samples[0], agreed=NOTHING_AGREED), d.served, 0, None)
    recorder.flush()
    (file,) = folder.glob("*.eptrace")
    before = file.stat().st_size
    recorder.snapshot(Snapshot(sample=d.samples[0], agreed=NOTHING_AGREED), d.served, 1, None)
    recorder.flush()
    return recorder, file.stat().st_size - before


def _migration(d: Deployment) -> list[Stage]:
    target = _round_the_ring(d.placement)
    migration = schedule(
        d.placement,
        target,
        target.even_quotas_LP(),
        topology=d.topology,
        expert_bytes_L=[EXPERT_BYTES] * d.shape.layers,
        pace=Pace.of_bytes(EXPERT_BYTES),
        staging_slots=2,
        rank=0,
    )
    prepared = PreparedMigration.of(migration, d.by_own_counts)
    exchange = RoundExchange(
        group=d.group, memory=d.memory, max_bytes=EXPERT_BYTES, staging_slots=2
    )
    batch, number = _busiest_round(migration.batches)
    commit = next(commit for commit in prepared.commits if commit.batch is batch)
    journal = _journal(d, True)
    wire = PlanBroadcast(
        group=d.group, shape=d.placement.slots_LP.shape, device=torch.device("cpu")
    )

    def committed() -> None:
        commit_batch(
            commit,
            d.served,
            layers=batch.layers[:1],
            staging=exchange.staging,
            memory=d.memory,
            counts=d.by_own_counts,
            rank=0,
        )
        journal.apply(BatchCommitted(batch))

    itinerary = batch.itinerary
    assert itinerary is not None
    return [
        Stage(
            name="broadcast a plan",
            where=MIGRATION,
            run=lambda: wire.begin(d.plan, d.pace),
            size=8 * wire._wire.numel(),
        ),
        Stage(
            name="a round",
            where=MIGRATION,
            run=lambda: exchange.exchange(batch, number),
            size=itinerary.sends.bytes_NR[number].nbytes * 2,
        ),
        Stage(name="vote", where=MIGRATION, run=lambda: exchange.vote(batch)),
        Stage(name="commit a layer", where=MIGRATION, run=committed),
    ]


def _round_the_ring(placement: Placement) -> Placement:
    """In every sixth layer each rank takes the first expert of the rank before it: about as many moves as a
    plan may make.
    """
    slots_LP = placement.slots_LP.copy()
    first = np.arange(placement.num_ranks) * placement.slots_per_rank
    for layer in range(0, placement.num_layers, 6):
        slots_LP[layer, first] = np.roll(slots_LP[layer, first], 1)
    return Placement(slots_LP, placement.num_experts, placement.num_ranks)


def _busiest_round(batches: tuple[Batch, ...]) -> tuple[Batch, int]:
    """That in which this rank does most."""

    def legs(batch: Batch, number: int) -> int:
        part = batch.itinerary
        assert part is not None
        return len([*part.sends.of_round(number), *part.receives.of_round(number)])

    rounds = [(batch, number) for batch in batches for number in range(len(batch.rounds))]
    return max(rounds, key=lambda one: legs(*one))


def _reports(d: Deployment) -> list[Stage]:
    journal = _journal(d, False)
    for sample in d.samples[:4]:
        journal.apply(SnapshotTaken(sample, d.served))

    def status() -> Status:
        return journal.report(d.served, d.config.metrics, steps=1, paused=False, files=FileHealth())

    def encoded() -> dict[str, bytes]:
        return {
            "status": encode(status()),
            "overview": encode(journal.overview(status(), d.served)),
            "load of every expert": encode(journal.load(d.served)),
        }

    payloads = encoded()
    return [
        Stage(
            name="status",
            where=POLL,
            run=lambda: encode(status()),
            size=len(payloads["status"]),
        ),
        Stage(
            name="overview, for the page",
            where=POLL,
            run=lambda: encode(journal.overview(status(), d.served)),
            size=len(payloads["overview"]),
        ),
        Stage(
            name="load of every expert",
            where=POLL,
            run=lambda: encode(journal.load(d.served)),
            size=len(payloads["load of every expert"]),
        ),
        *_metrics(d, payloads["status"], MetricsConfig(), "metrics"),
        *_metrics(
            d,
            encode(
                journal.report(
                    d.served,
                    MetricsConfig(layer_rank_tokens=True),
                    steps=1,
                    paused=False,
                    files=FileHealth(),
                )
            ),
            MetricsConfig(layer_rank_tokens=True),
            "metrics, with layer_rank_tokens",
        ),
        Stage(
            name="status of two pipeline stages",
            where=SERVER,
            run=lambda: whole_report([payloads["status"]] * 2, Status),
        ),
    ]


def _metrics(d: Deployment, payload: bytes, config: MetricsConfig, name: str) -> list[Stage]:
    registry = CollectorRegistry()
    exporter = Exporter(model_name=d.shape.title, config=config, registry=registry)

    def exported() -> bytes:
        exporter.update(msgspec.json.decode(payload, type=Status))
        return generate_latest(registry)

    page = exported()
    series = sum(not line.startswith(b"#") for line in page.splitlines())
    return [Stage(name=f"{name}: series", where=SERVER, run=exported, size=series)]


def _planner_thread(d: Deployment) -> list[Stage]:
    cost = TokenCost()
    expert_time = ExpertTimeEstimate(
        d.config.decision.expert_time_fraction,
        cost=cost,
        phases=d.config.planner.phases,
        by_own_counts=True,
    )
    expert_time.add(d.samples[:2])
    fraction = expert_time.at(expert_time.latest)
    migration = d.rounds()
    identity = ModelIdentity(
        model="", config_hash="", experts=d.shape.experts, ep_size=d.ranks, redundant_experts=0
    )
    header = Header(
        format=FORMAT,
        version=FORMAT_VERSION,
        identity=identity,
        generation=0,
        saved_at=0.0,
        plugin_version="",
    )
    state = SavedState(
        header=header,
        placement=d.placement,
        quotas_LP=d.plan.quotas_LP,
        load_LE=d.load.load_LE,
    )
    path = d.folder / f"state-{d.ranks}.npz"
    save_state(path, state)
    wire = PlanBroadcast(
        group=d.group, shape=d.placement.slots_LP.shape, device=torch.device("cpu")
    )
    host = wire.begin(d.plan, d.pace).result().numpy()

    def prepared() -> PreparedMigration:
        return PreparedMigration.of(migration, d.by_own_counts)

    return [
        Stage(
            name="sum up the window",
            where=PLANNER,
            run=lambda: window_load(d.samples),
            size=d.load.tokens_WLE.nbytes,
        ),
        Stage(
            name="learn from a snapshot's step time",
            where=PLANNER,
            run=lambda: expert_time.add(d.samples[:1]),
        ),
        Stage(
            name="fit quotas",
            where=PLANNER,
            run=lambda: cost.split(d.load, d.placement),
            size=d.plan.quotas_LP.nbytes,
        ),
        Stage(
            name="dispatch tables",
            where=PLANNER,
            run=lambda: d.by_own_counts.dispatch_tables(
                d.placement, d.plan.quotas_LP, d.load.load_LE
            ),
            size=_bytes_of_tables(prepared().split),
        ),
        Stage(
            name="plan, its quotas and its promise",
            where=PLANNER,
            run=d.make_plan,
        ),
        Stage(
            name="decide",
            where=PLANNER,
            run=lambda: decide(
                d.plan,
                step_seconds=STEP_SECONDS,
                expert_time=fraction,
                current=d.placement,
                transport=d.transport,
                config=d.config.decision,
            ),
        ),
        Stage(name="read a plan", where=PLANNER, run=lambda: read_plan(host), size=host.nbytes),
        Stage(
            name="work out the rounds",
            where=PLANNER,
            run=d.rounds,
            size=_bytes_of_rounds(migration.batches),
        ),
        Stage(name="prepare the commits", where=PLANNER, run=prepared),
        Stage(
            name="save the state",
            where=PLANNER,
            run=lambda: save_state(path, state),
            size=path.stat().st_size,
        ),
    ]


def _bytes_of_tables(split: Split) -> int:
    tables = split.tables
    parts = (tables.slots_LEC, tables.thresholds_LEC, tables.pours_LO, tables.ground_LR)
    return sum(part.nbytes for part in parts if part is not None)


def _bytes_of_rounds(batches: tuple[Batch, ...]) -> int:
    total = 0
    for batch in batches:
        assert batch.itinerary is not None
        for legs in (batch.itinerary.sends, batch.itinerary.receives):
            total += legs.bytes_NR.nbytes + legs.legs_X6.nbytes
    return total


def _start(d: Deployment) -> list[Stage]:
    def rings() -> None:
        for link in ("intranode", "internode"):
            ring(d.topology, link).splits(0, 1)

    exchange = RoundExchange(group=d.group, memory=d.memory, max_bytes=1 << 20, staging_slots=2)
    read: list[int] = []
    rank_agreement.logger.disabled = True  # settings that differ are not what is timed

    def agreed() -> None:
        read[:] = [_agree_as_rank_0(d)]

    agreed()
    return [
        Stage(name="agree on settings, rank 0", where=START, run=agreed, size=read[0]),
        Stage(name="who measures links with whom", where=START, run=rings),
        Stage(
            name="connect to all ranks",
            where=START,
            run=exchange.warm_up,
            size=exchange.reserved_bytes,
        ),
        Stage(name="reserve tables", where=START, run=lambda: d._tables(128, True)),
        Stage(name="check a placement", where=START, run=lambda: replace(d.placement)),
    ]


def _agree_as_rank_0(d: Deployment) -> int:
    """After all others have said what they run. Returns the bytes that rank 0 reads of them."""
    store = dist.HashStore()
    ranks = list(range(d.ranks))
    boards = rank_agreement._Boards.of(store, ranks, 1.0)
    said = {"version": __version__, "sources": source_digest(), "config": d.config.as_dict()}
    for rank in ranks[1:]:
        boards.said.post(rank, said)
        boards.found.post(rank, None)
    rank_agreement.agree(d.config, ranks, store)
    return d.ranks * len(json.dumps(said))
