"""vLLM's balancer in replay, with a stand-in for its policy. tests/engines holds it to the real one."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from numpy.typing import NDArray
from traces import head_of, snapshots, write_trace

from ep_rebalance.offline import scenarios
from ep_rebalance.offline.eplb_settings import Eplb, EplbSettings, eplb_settings
from ep_rebalance.offline.eplb_transfers import layer_transfers
from ep_rebalance.offline.notebook import replay
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.vllm_eplb import CountRing, VllmEplb
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.topology import Topology

HEAD = head_of(layers=3, experts=8, ranks=2, redundant=2, origin="generated")
NODES = Topology(node_of_rank=(0, 0, 1), bytes_per_second=(100.0, 10.0, 2.0))


def swap_ranks(load_LE: NDArray[np.int64], slots_LP: NDArray[np.int32], **_: int) -> NDArray:
    """A policy that gives each rank the experts of the one before it."""
    return np.roll(slots_LP, slots_LP.shape[1] // 2, axis=1).astype(np.int64)


def peer(bytes_per_second: float = 1e9, **settings: object) -> VllmEplb:
    return VllmEplb(
        Eplb(policy=swap_ranks, settings=EplbSettings.model_validate(settings)),
        loaded=Placement.contiguous(num_layers=3, num_experts=8, num_ranks=2, num_redundant=2),
        topology=Topology(node_of_rank=(0, 0), bytes_per_second=(1e9, bytes_per_second, 1e9)),
        expert_bytes_L=[1000] * 3,
        expert_time=ExpertTime(fraction=1.0),
    )


def served(balancer: VllmEplb, count: int) -> list[NDArray[np.int32]]:
    maps = []
    for snapshot in snapshots(HEAD, count):
        balancer.snapshot(snapshot)
        maps.append(balancer.placement.slots_LP)
    return maps


def test_a_ring_credits_old_counts_by_the_newest_map() -> None:
    ring = CountRing(4)
    ring.append(3, np.array([[1.0, 10.0]]))
    ring.append(2, np.array([[5.0, 0.0]]))  # in place of one of the three
    assert ring.decoded_LE(np.array([[0, 1]]), 2).tolist() == [[12, 20]]
    assert ring.decoded_LE(np.array([[1, 0]]), 2).tolist() == [[20, 12]]
    ring.append(9, np.array([[1.0, 2.0]]))
    assert ring.decoded_LE(np.array([[0, 0]]), 2).tolist() == [[12, 0]]


def test_a_map_is_scored_from_the_first_snapshot_that_begins_with_it() -> None:
    balancer = peer(step_interval=80, window_size=80, use_async=False)
    maps = served(balancer, 4)
    assert [plan.step for plan in balancer.plans] == [20]
    assert (maps[1] == maps[0]).all()  # steps 17 to 32 hold the twentieth
    assert (maps[2] != maps[0]).any()


def test_the_engine_stands_still_for_all_layers_of_a_synchronous_rearrangement() -> None:
    balancer = peer(10_000.0, step_interval=80, window_size=80, use_async=False)
    served(balancer, 4)
    (plan,) = balancer.plans
    # Experts 0 and 1 are on both ranks. The 3 others of each rank go to the other one, 0.1 s each.
    assert plan.stall_seconds == pytest.approx(3 * 3 * 0.1)
    assert (plan.moved, plan.serial_transfers) == (30, 9)
    assert plan.bytes == {"intranode": 3 * 6 * 1000, "local": 3 * 4 * 1000}


def test_a_layer_is_in_service_when_its_transfers_are_done() -> None:
    balancer = peer(10_000.0, step_interval=80, window_size=80, use_async=True)
    # 0.3 s a layer and 0.05 s a step: 6 steps each, or 7 by rounding.
    served(balancer, 4)
    (plan,) = balancer.plans
    assert plan.served_at is not None
    assert 20 + 3 * 6 <= plan.served_at <= 20 + 3 * 7
    assert (plan.moved, plan.layers, plan.stall_seconds) == (30, (0, 1, 2), 0.0)


def test_the_next_rearrangement_waits_until_all_layers_are_there() -> None:
    balancer = peer(2000.0, step_interval=20, window_size=20, use_async=True)
    served(balancer, 12)  # 1.5 s a layer: 30 steps
    first, second = balancer.plans[:2]
    assert first.step == 5
    assert first.served_at is not None
    assert second.step == first.served_at > 5 + 3 * 30 - 1


def test_layers_that_are_still_on_their_way_at_the_end_are_not_counted() -> None:
    balancer = peer(2000.0, step_interval=20, window_size=20, use_async=True)
    served(balancer, 3)
    assert [(plan.moved, plan.layers) for plan in balancer.plans] == [(10, (0,))]


def test_steps_that_were_not_recorded_pass_for_the_timer() -> None:
    balancer = peer(step_interval=400, window_size=400, use_async=False)
    for number, snapshot in enumerate(snapshots(HEAD, 6)):
        later = 60 if number > 3 else 0
        balancer.snapshot(replace(snapshot, step=snapshot.step + later))
    assert [plan.step for plan in balancer.plans] == [100]


def test_steps_without_tokens_leave_the_ring_as_it_is() -> None:
    asked: list[NDArray[np.int64]] = []

    def noted(load_LE: NDArray[np.int64], slots_LP: NDArray[np.int32], **_: int) -> NDArray:
        asked.append(load_LE)
        return slots_LP.astype(np.int64)

    balancer = VllmEplb(
        Eplb(policy=noted, settings=EplbSettings(step_interval=64, window_size=16)),
        loaded=Placement.contiguous(num_layers=3, num_experts=8, num_ranks=2, num_redundant=2),
        topology=Topology.single_node(2),
        expert_bytes_L=[1000] * 3,
        expert_time=ExpertTime(fraction=1.0),
    )
    (busy,) = snapshots(HEAD, 1)
    balancer.snapshot(busy)
    for number in (2, 3, 4, 5):
        idle = replace(busy, counts_ALE=np.zeros_like(busy.counts_ALE), step=16 * number)
        balancer.snapshot(idle)
    assert [int(load_LE.sum()) for load_LE in asked] == [int(busy.counts_ALE.sum())] * 2


def test_replicas_take_receivers_in_turns_and_links_count_once_per_rank() -> None:
    old_P, new_P = np.array([0, 1, 2, 3, 4, 5]), np.array([2, 0, 2, 5, 5, 5])
    made = layer_transfers(old_P, new_P, topology=NODES, expert_bytes=20)
    # Expert 2 goes from rank 1 to rank 0, expert 5 once from rank 2 to rank 1.
    assert made.moved == 4
    assert made.bytes == {"intranode": 20, "internode": 20, "local": 40}
    assert made.seconds == pytest.approx(20 / 2)
    assert made.serial == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param({"step_intervall": 5}, "step_intervall=5: Extra inputs", id="unknown"),
        pytest.param({"window_size": 0}, "window_size=0: Input should be greater", id="bound"),
        pytest.param({"expert_groups": 3}, "8 experts do not divide by", id="groups"),
    ],
)
def test_settings_that_cannot_be_are_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        eplb_settings(given, experts=8)
    assert eplb_settings({}, experts=256, groups=8).expert_groups == 8


def test_without_vllm_the_policies_that_remain_are_named(tmp_path: Path, monkeypatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("No module named 'vllm'")

    monkeypatch.setattr(scenarios, "resolve_name", missing)
    trace = write_trace(tmp_path, HEAD, 4)
    with pytest.raises(ValueError, match="vllm-eplb needs vLLM in this environment") as raised:
        replay(trace, "vllm-eplb")
    left = str(raised.value).partition("without it there are ")[2].split(", ")
    assert left == [name for name in REPLAY_POLICIES if not name.startswith("vllm")]


def test_settings_without_their_policy_are_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path, HEAD, 4)
    done = run("replay", str(trace), "--eplb", "step_interval=5")
    assert done.exit_code == 2
    assert "add --policy vllm-eplb" in done.stderr


def test_a_trace_that_is_too_short_is_said_to_be(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scenarios, "resolve_name", lambda _: swap_ranks)
    trace = write_trace(tmp_path, HEAD, 4)
    options = ("--policy", "vllm-eplb", "--format", "table", "--jobs", "1")
    done = run("replay", str(trace), *options, COLUMNS="200")
    assert "vllm-eplb acts first after 750 steps." in done.stdout
    done = run("replay", str(trace), *options, "--eplb", "step_interval=80", COLUMNS="200")
    assert "Standing still for experts on their way: vllm-eplb 2+2 0 s." in done.stdout
    assert "acts first" not in done.stdout


def test_csv_has_a_line_for_it_beside_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scenarios, "resolve_name", lambda _: swap_ranks)
    trace = write_trace(tmp_path, HEAD, 4)
    policies = ("--policy", "vllm-eplb", "--policy", "none")
    done = run("replay", str(trace), *policies, "--format", "csv", "--jobs", "1")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["policy"], row["stall_seconds"]) for row in rows] == [
        ("vllm-eplb", "0"),
        ("none", "0"),
    ]
