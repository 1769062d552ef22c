"""Journal: what snapshots add up to, in the status and in the load of every expert."""

import numpy as np
import pytest

from ep_rebalance.config import MetricsConfig, RebalanceConfig
from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.decision import Decision
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.problem import Plan
from ep_rebalance.planning.proposal import Proposal, TimedProposal
from ep_rebalance.telemetry.events import PlanProposed, SnapshotTaken
from ep_rebalance.telemetry.file_health import FileHealth
from ep_rebalance.telemetry.journal import Journal, initial_status
from ep_rebalance.telemetry.metrics import encode
from ep_rebalance.topology import Topology

TOP_K = 2
LOADED = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2, num_redundant=2)
SERVED = Served(
    placement=Placement(np.array([[0, 1, 2, 3, 0, 2], [0, 1, 2, 3, 0, 1]]), 4, 2),
    quotas_LP=np.array([[0.25, 1, 0.5, 1, 0.75, 0.5], [0.5, 0.5, 1, 1, 0.5, 0.5]]),
    generation=3,
)
PREFILL_LE = [[8, 4, 2, 2], [4, 4, 4, 4]]
DECODE_LE = [[0, 1, 1, 0], [2, 0, 0, 0]]


def snapshot(prefill_LE, decode_LE) -> SnapshotTaken:
    sample = LoadSample(counts_ALE=np.array([prefill_LE, decode_LE]), steps=4, step_seconds=0.1)
    return SnapshotTaken(sample, SERVED)


@pytest.fixture
def journal() -> Journal:
    """After two snapshots of the same load, and one without tokens."""
    status = initial_status(config=RebalanceConfig(), model="m", placement=LOADED, top_k=TOP_K)
    journal = Journal(status, contiguous=LOADED, top_k=TOP_K, rank=0)
    for _ in range(2):
        journal.apply(snapshot(PREFILL_LE, DECODE_LE))
    journal.apply(snapshot(np.zeros((2, 4)), np.zeros((2, 4))))
    return journal


def test_links_are_told_where_there_are_any():
    speeds = {"bytes_per_second": (9.0, 7.0, 5.0), "round_seconds": 0.5}
    for node_of_rank, links in (
        ((0, 0), {"intranode": 7.0}),
        ((0, 1), {"internode": 5.0}),
        ((0,), {}),
    ):
        topology = Topology(node_of_rank=node_of_rank, **speeds)
        status = initial_status(
            config=RebalanceConfig(), model="m", placement=LOADED, top_k=TOP_K, topology=topology
        )
        assert status.links == links | {"round_seconds": 0.5}


def test_load_holds_what_every_expert_got_and_where_it_is_served(journal: Journal):
    load = journal.load(SERVED)
    assert (load.model, load.started, load.generation) == ("m", journal.status.started, 3)
    for index, layer in enumerate(load.layers):
        assert layer.tokens == {
            "prefill": [2 * tokens for tokens in PREFILL_LE[index]],
            "decode": [2 * tokens for tokens in DECODE_LE[index]],
        }
        assert layer.slots == SERVED.placement.slots_LP[index].tolist()
        assert layer.quotas == SERVED.quotas_LP[index].tolist()


def test_load_adds_up_to_the_tokens_of_the_status(journal: Journal):
    status = journal.report(SERVED, MetricsConfig(), steps=3, paused=False, files=FileHealth())
    for layer in journal.load(SERVED).layers:
        for phase, tokens in status.phase_tokens.items():
            assert sum(layer.tokens[phase]) == tokens * TOP_K


def test_load_of_the_experts_is_not_in_the_status_unless_asked_for(journal: Journal):
    status = journal.report(SERVED, MetricsConfig(), steps=3, paused=False, files=FileHealth())
    assert status.expert_tokens == status.replicas == []
    assert b'"expert_tokens":[],' in encode(status)


def test_optional_metrics_are_filled_where_they_are_switched_on(journal: Journal):
    status = journal.report(
        SERVED,
        MetricsConfig(expert_tokens=True, replicas=True),
        steps=3,
        paused=False,
        files=FileHealth(),
    )
    assert status.expert_tokens == [[16, 10, 6, 4], [12, 8, 8, 8]]
    assert status.replicas == [2, 2]


def test_files_that_cannot_be_written_are_told(journal: Journal):
    files = FileHealth(
        faults={"trace": "", "state": "no space left"}, lost_trace_records=4, state_saved=9.0
    )
    status = journal.report(SERVED, MetricsConfig(), steps=3, paused=False, files=files)
    assert status.file_faults == {"trace": "", "state": "no space left"}
    assert status.file_failing == {"trace": 0, "state": 1}
    assert (status.lost_trace_records, status.state_saved_timestamp) == (4, 9.0)


def proposed(expert_time: ExpertTime) -> PlanProposed:
    decision = Decision(
        outcome="no_gain",
        reason="no",
        predicted_gain=0.0,
        predicted_saved_seconds=0.0,
        migration_seconds=0.0,
        pace=Pace.of_bytes(4096),
    )
    plan = Plan(
        placement=LOADED,
        quotas_LP=LOADED.even_quotas_LP(),
        unmoved_quotas_LP=LOADED.even_quotas_LP(),
        imbalance_before_L=np.ones(2),
        imbalance_after_L=np.ones(2),
        moved_slots=0,
    )
    proposal = Proposal(
        plan=plan,
        decision=decision,
        expert_time=expert_time,
        achieved_gain=None,
        measured_gain=None,
        trust=1.0,
    )
    return PlanProposed(TimedProposal(proposal=proposal, seconds=0.01))


def test_the_fraction_that_waits_for_experts_is_shown_with_how_it_is_known(journal: Journal):
    status = journal.status
    assert (status.expert_time, status.expert_time_learned) == ({}, 0)
    journal.apply(proposed(ExpertTime(fraction=0.4, standard_error=0.05, source="learned")))
    assert status.expert_time == pytest.approx({"low": 0.3, "estimate": 0.4, "high": 0.5})
    assert (status.expert_time_learned, status.expert_time_reason) == (1, "")
    assumed = ExpertTime(fraction=0.5, standard_error=0.3, source="assumed", reason="why")
    journal.apply(proposed(assumed))
    assert status.expert_time == {"low": 0.0, "estimate": 0.5, "high": 1.0}
    assert (status.expert_time_learned, status.expert_time_reason) == (0, "why")
