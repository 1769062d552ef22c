"""Traces of experts that do not divide by the ranks: read rightly, or refused with what can be done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from traces import contiguous, head_of, records_of, snapshots, write_trace

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedPlacement, TraceReader, TraceWriter
from ep_rebalance.offline.run import replay
from ep_rebalance.offline.scenarios import scenario
from ep_rebalance.offline.step_time import RankLoad
from ep_rebalance.placement import Placement

EXPERTS, LAYERS, COUNT = 7, 2, 12
HEAD = head_of(layers=LAYERS, experts=EXPERTS, config=load_config({"mode": "observe"}).as_dict())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("uneven"), HEAD, COUNT)


def loads_NLR() -> np.ndarray:
    """float64 [N, L, R], what rank 0 with its four experts and rank 1 with its three had."""
    loads_NLE = np.array([snapshot.counts_ALE.sum(0) for snapshot in snapshots(HEAD, COUNT)])
    return np.stack([loads_NLE[..., :4].sum(-1), loads_NLE[..., 4:].sum(-1)], axis=-1)


def test_what_each_rank_had_is_summed_up(path: Path) -> None:
    found = json.loads(run("inspect", str(path), "--json").stdout)
    assert (found["head"]["ep_size"], found["head"]["slots"]) == (2, EXPERTS)
    of_layers_L = 2 * loads_NLR().max(-1).sum(0) / loads_NLR().sum((0, 2))
    assert found["imbalance"] == pytest.approx(of_layers_L.mean())
    assert dict(found["worst_layers"]) == pytest.approx(dict(enumerate(of_layers_L)))


@pytest.mark.parametrize("hardware", [None, "h100-sxm"])
@pytest.mark.parametrize("policy", ["none", "recorded"])
def test_policies_that_move_nothing_replay_what_was_served(
    path: Path, policy: str, hardware: str | None
) -> None:
    reader = TraceReader(path)
    one = scenario(HEAD, load_config(HEAD.config), policy, 2, 0, hardware=hardware)
    replayed = replay(reader.head, reader, one)
    loads = loads_NLR()
    busiest_N, mean_N = loads.max(-1).sum(1), loads.mean(-1).sum(1)
    assert replayed.imbalance_N == pytest.approx(busiest_N / mean_N)
    assert replayed.share_LR == pytest.approx(
        loads.sum(0) / loads.sum(0).mean(axis=1, keepdims=True)
    )
    assert replayed.pairs_N == pytest.approx(loads.sum((1, 2)))
    # Each rank brings half of every expert's tokens, and both are on one node.
    assert replayed.home_share == pytest.approx(0.5)
    assert replayed.node_share == pytest.approx(1.0)


def test_experts_that_were_dealt_out_are_replayed_where_they_were(tmp_path: Path) -> None:
    dealt = Placement.round_robin(num_layers=LAYERS, num_experts=EXPERTS, num_ranks=2)
    writer = TraceWriter(tmp_path, "load", HEAD)
    began = contiguous(HEAD)
    writer.write(
        RecordedPlacement(
            placement=dealt, quotas_LP=began.quotas_LP, generation=0, step=0, time=1.0
        )
    )
    for snapshot in snapshots(HEAD, COUNT):
        writer.write(snapshot)
    writer.close()
    reader = TraceReader(writer.files()[0])
    (placed, *_) = records_of(writer.files()[0])
    assert placed.placement == dealt
    one = scenario(HEAD, load_config(HEAD.config), "recorded", 2, 0)
    replayed = replay(reader.head, reader, one)
    for snapshot, imbalance in zip(snapshots(HEAD, COUNT), replayed.imbalance_N, strict=True):
        load_LE = snapshot.counts_ALE.sum(0)
        dealt_LR = np.stack([load_LE[:, ::2].sum(1), load_LE[:, 1::2].sum(1)], axis=1)
        load = RankLoad.of(load_LE, dealt, dealt.even_quotas_LP())
        assert (load.tokens_LR == dealt_LR).all()
        assert imbalance == pytest.approx(dealt_LR.max(1).sum() / dealt_LR.mean(1).sum())


@pytest.mark.parametrize("policy", ["ours", "greedy", "static", "hindsight"])
def test_policies_that_move_experts_say_what_makes_them_even(path: Path, policy: str) -> None:
    refused = run("replay", str(path), "--policy", policy)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert "7 experts and 0 redundant ones do not divide by 2 ranks" in said
    assert "possible are 1, 3, 5, ... redundant ones, or another number of ranks" in said
    assert "none, recorded" in said


def test_a_best_placement_needs_as_many_slots_on_every_rank(path: Path, tmp_path: Path) -> None:
    refused = run("plan", str(path), "--to", "sglang", "-o", str(tmp_path / "p.json"))
    assert refused.exit_code == 2
    assert "possible are 1, 3, 5, ..." in " ".join(refused.stderr.split())
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("to", ["sglang", "tensorrt-llm", "vllm-ascend"])
def test_no_engine_is_given_a_placement_that_it_cannot_start_with(
    path: Path, tmp_path: Path, to: str
) -> None:
    target = tmp_path / "placement"
    refused = run("convert", str(path), str(target), "--to", to)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert "7 slots do not divide by 2 ranks" in said
    assert "--redundant 1" in said
    assert not target.exists()


@pytest.mark.usefixtures("compiled_planner")
def test_with_redundant_experts_they_are_replayed_and_placed(path: Path, tmp_path: Path) -> None:
    done = run("replay", str(path), "--redundant", "1", "--format", "json", "--quiet")
    assert done.exit_code == 0, done.stderr
    rows = {row["policy"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["none"]["redundant_experts"] == rows["ours"]["redundant_experts"] == 1
    target = tmp_path / "p.json"
    placed = run("plan", str(path), "--redundant", "1", "--to", "sglang", "-o", str(target))
    assert placed.exit_code == 0, placed.stderr
    assert len(json.loads(target.read_text())["physical_to_logical_map"][0]) == 8
