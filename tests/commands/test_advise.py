"""`ep-rebalance advise` for models and machines that are in no table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import run
from known_checkpoints import KNOWN
from traces import head_of, snapshots

from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceWriter
from ep_rebalance.offline.hardware_table import hardware_names
from ep_rebalance.offline.step_time import Hardware, load_hardware
from ep_rebalance.placement import Placement

SKEWED = [900, 800, 700, 600, 500, 400, 300, 200]
"""Two neighbours on each of four ranks: 1700, 1300, 900, 500 of a mean of 1100."""


def write(folder: Path, head: Any, records: list[RecordedSnapshot]) -> Path:
    placement = Placement.contiguous(
        num_layers=head.layers, num_experts=head.experts, num_ranks=head.ep_size
    )
    folder.mkdir(exist_ok=True)
    writer = TraceWriter(folder, "load", head)
    writer.write(
        RecordedPlacement(
            placement=placement,
            quotas_LP=placement.even_quotas_LP(),
            generation=0,
            step=0,
            time=1.0,
        )
    )
    for record in records:
        writer.write(record)
    writer.close()
    return folder


def small(folder: Path, loads: list[list[int]], *, phase: int = 0, **changes: Any) -> Path:
    """A converted trace of one layer: a snapshot for each load."""
    head = head_of(
        layers=1, experts=8, ranks=1, top_k=1, origin="by hand", expert_bytes=[0], hidden_size=0, **changes
    )  # fmt: skip
    records = []
    for number, load in enumerate(loads):
        counts_ALE = np.zeros((2, 1, 8), dtype=np.uint32)
        counts_ALE[phase, 0] = load
        records.append(
            RecordedSnapshot(
                counts_ALE=counts_ALE,
                step=16 * (number + 1),
                steps=16,
                step_seconds=0.0,
                time=1.0 + number,
                generation=0,
            )
        )
    return write(folder, head, records)


SIZE = ("--expert-bytes", "1000000", "--hidden-size", "512")


def advised(folder: Path, *options: str) -> dict[str, Any]:
    done = run("advise", str(folder), "--json", "--jobs", "1", *options)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(folder: Path, *options: str) -> str:
    done = run("advise", str(folder), *options)
    assert done.exit_code == 2
    return done.stderr


def of(found: dict[str, Any], question: str) -> dict[str, Any]:
    (statement,) = (one for one in found["statements"] if one["question"] == question)
    return statement  # type: ignore[no-any-return]


def test_a_small_case_comes_to_what_it_comes_to_by_hand(tmp_path: Path):
    """Eight experts on four ranks: the largest with the smallest is even."""
    loads = [SKEWED] * 6
    found = advised(
        small(tmp_path, loads), *SIZE, "--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0"
    )
    imbalance = of(found, "imbalance")
    assert imbalance["values"]["loaded"] == pytest.approx(1700 / 1100)
    assert imbalance["values"]["placed"] == pytest.approx(1.0)
    assert imbalance["values"]["hottest_expert"] == pytest.approx(900 / 1100)
    assert imbalance["text"].startswith("On 4 GPUs the busiest has 1.545 times the mean load")
    assert "at most 35.3% off" in imbalance["text"]
    lasts = of(found, "persistence")
    assert lasts["values"]["kept"] == pytest.approx(1.0)
    assert "imbalance lasts" in lasts["text"]
    assert all(statement["how"] for statement in found["statements"])


def test_a_load_that_turns_round_is_said_to_pass(tmp_path: Path):
    loads = [SKEWED, [*SKEWED[4:], *SKEWED[:4]]] * 3
    # Made for either half, the pairs of the other one meet: 900 + 500 beside 200 + 600.
    found = advised(
        small(tmp_path, loads), *SIZE, "--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0"
    )
    values = of(found, "persistence")["values"]
    assert values["parts"] == 6
    assert values["next_placed"] >= values["next_bound"]
    assert values["next_bound"] == pytest.approx(1.0)


def test_one_snapshot_tells_nothing_of_what_lasts(tmp_path: Path):
    found = advised(
        small(tmp_path, [SKEWED]), *SIZE, "--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0"
    )  # fmt: skip
    assert "not known" in of(found, "persistence")["text"]
    assert "Record longer" in of(found, "persistence")["text"]
    assert "too short for a plan" in of(found, "expert_parallel")["text"]
    assert of(found, "expert_parallel")["values"]["saved"] is None


def test_hot_experts_beside_cold_ones_are_nothing_to_gain(tmp_path: Path):
    beside = [900, 100, 100, 900, 500, 500, 900, 100]
    found = advised(
        small(tmp_path, [beside] * 6), *SIZE, "--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0"
    )  # fmt: skip
    assert "nothing to even out" in of(found, "imbalance")["text"]
    told = of(found, "expert_parallel")["text"]
    assert "even already: serve without the plugin" in told
    assert not any("--plugin" in row["command"] for row in found["rows"])


@pytest.mark.parametrize("name", ["GLM-4.5-Air", "OLMoE-1B-7B", "LFM2-8B-A1B"])
def test_any_model_is_advised_by_its_configuration(tmp_path: Path, name: str):
    (known,) = (one for one in KNOWN if one.name == name)
    path = known.write(tmp_path / "models")
    head = head_of(
        layers=2, experts=known.experts, ranks=2, top_k=known.top_k, expert_bytes=[0, 0], hidden_size=0
    )  # fmt: skip
    folder = write(tmp_path / "traces", head, list(snapshots(head, 12)))
    options = ("--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0")
    assert "--model CONFIG" in refused(folder, *options)
    found = advised(folder, *options, "--model", str(path))
    width = known.config.get("moe_intermediate_size") or known.config["intermediate_size"]
    assert found["expert_size"]["expert_bytes"] == 2 * 3 * known.config["hidden_size"] * width
    assert "by config.json" in found["expert_size"]["how"]
    assert {row["weight_bytes"] for row in found["rows"]} == {
        2 * known.experts // 4 * found["expert_size"]["expert_bytes"]
    }
    by_file = advised(folder, *options, "--model", str(path / "config.json"))
    assert by_file["expert_size"] | {"how": ""} == found["expert_size"] | {"how": ""}


def test_phases_are_told_apart_where_the_trace_knows_them(tmp_path: Path):
    head = head_of(layers=2, experts=16, ranks=2)
    folder = write(tmp_path, head, list(snapshots(head, 12)))
    options = ("--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0", "--redundant", "1")
    found = advised(folder, *options, *SIZE)
    told = [one["text"] for one in found["statements"] if one["question"] == "imbalance"]
    assert [text.partition(" ")[0] for text in told] == ["On", "prefill:", "decode:"]
    redundancy = of(found, "redundancy")
    assert redundancy["values"]["extra_bytes"] == 4 * 2 * 1_000_000 // 4
    assert {"prefill_longer", "decode_longer"} < set(redundancy["values"])
    assert "formula" in redundancy["how"]


def test_what_vllms_own_balancer_does_is_replayed(tmp_path: Path):
    found = advised(
        small(tmp_path, [SKEWED] * 60), *SIZE, "--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0"
    )  # fmt: skip
    values = of(found, "vllm_eplb")["values"]
    assert 1.0 <= values["vllm_eplb_imbalance"] < 1700 / 1100
    assert 1.0 <= values["ours_imbalance"] < 1700 / 1100
    cold = of(found, "cold_start")
    assert 0 < cold["values"]["steps"] <= 60 * 16
    assert cold["values"]["moved"] > 0


def test_a_recording_that_is_too_short_for_vllms_timer_is_said_to_be(tmp_path: Path):
    found = advised(
        small(tmp_path, [SKEWED] * 6), *SIZE, "--hardware", "h100-sxm", "--gpus", "4", "--redundant", "0"
    )  # fmt: skip
    assert (
        "rearranges after 750 steps first, and 96 were recorded" in of(found, "vllm_eplb")["text"]
    )


# --- hardware


def test_without_an_accelerator_the_ways_to_name_one_are_told(tmp_path: Path):
    told = refused(small(tmp_path, [SKEWED]), *SIZE)
    assert "--measure" in told
    assert hardware_names()[0] in told


def test_this_machine_can_be_measured(tmp_path: Path):
    folder = small(tmp_path, [SKEWED] * 4)
    found = advised(folder, *SIZE, "--measure", "--gpus", "4", "--redundant", "0")
    figures = found["hardware"]["figures"]
    assert found["hardware"]["name"].startswith("this machine, ")
    assert 1e8 < figures["memory_bytes_per_second"] < 1e14
    assert 1e8 < figures["flops_per_second"] < 1e16
    assert "measured" in found["hardware"]["how"]["memory_bytes_per_second"]
    assert set(found["hardware"]["how"]) == set(Hardware.model_fields)


def test_links_between_nodes_are_not_made_up(tmp_path: Path):
    folder = small(tmp_path, [SKEWED] * 4)
    options = (*SIZE, "--measure", "--gpus", "4", "--gpus-per-node", "2", "--redundant", "0")
    assert "links between nodes cannot be measured" in refused(folder, *options)
    found = advised(folder, *options, "--hardware", "h20")
    assert found["hardware"]["figures"]["internode"] == load_hardware("h20")[1].internode
    assert "h20" in found["hardware"]["how"]["internode"]


def test_a_file_of_figures_is_an_accelerator(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"own": load_hardware("h20")[1].model_dump()}))
    folder = small(tmp_path / "trace", [SKEWED] * 4)
    found = advised(folder, *SIZE, "--hardware", str(file), "--gpus", "4", "--redundant", "0")
    assert found["hardware"]["name"] == "own"


# --- sizes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 16}, "16 experts, the trace 8"),
        ({"num_experts_per_tok": 2}, "2 experts per token, the trace 1"),
        ({"hidden_size": None}, "--expert-bytes and --hidden-size"),
        ({"num_experts": 0}, "0 experts, the trace 8"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, changes, words):
    config = {
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    folder = small(tmp_path / "trace", [SKEWED])
    told = refused(folder, "--hardware", "h20", "--model", str(tmp_path))
    assert words in told


def test_a_given_size_counts_before_that_of_a_configuration(tmp_path: Path):
    config = {"num_experts": 8, "hidden_size": 64, "moe_intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = small(tmp_path / "trace", [SKEWED] * 4)
    options = ("--hardware", "h20", "--gpus", "4", "--redundant", "0", "--model", str(tmp_path))
    size = advised(folder, *options, "--expert-bytes", "5000")["expert_size"]
    assert (size["expert_bytes"], size["hidden_size"]) == (5000, 64)
    assert size["how"].startswith("given by --expert-bytes; else")
