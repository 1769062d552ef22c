"""Layers keep the numbers that they have in the model, from a recording to every placement made from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import run

from ep_rebalance.load.trace import TraceReader

ROWS = 9
INTERLEAVED, DENSE_FIRST = (2, 4, 6), (3, 4, 5, 6, 7, 8)
EXPERTS, RANKS = 8, 2


def counts(moe_layers: tuple[int, ...]) -> np.ndarray:
    """SGLang's [layers][experts]: layers without experts are zeros."""
    found = np.zeros((ROWS, EXPERTS), int)
    found[list(moe_layers)] = np.random.default_rng(1).multinomial(
        4000, np.arange(1, EXPERTS + 1) / 36, len(moe_layers)
    )
    return found


def recorded(tmp_path: Path, moe_layers: tuple[int, ...]) -> tuple[Path, str]:
    """(trace, what was said while it was made)."""
    source, target = tmp_path / "record.json", tmp_path / "load.eptrace"
    source.write_text(json.dumps({"logical_count": counts(moe_layers).tolist()}))
    done = run("convert", str(source), str(target), "--top-k", "2")
    assert done.exit_code == 0, done.stderr
    return target, done.stderr


def planned(trace: Path, to: str, *options: str) -> str:
    output = trace.with_name(f"placement-{to}")
    sizes = ("--ep-size", str(RANKS), "--redundant", "0")
    done = run("plan", str(trace), *sizes, "--to", to, "-o", str(output), *options)
    assert done.exit_code == 0, done.stderr
    return output.read_text()


@pytest.mark.parametrize("moe_layers", [INTERLEAVED, DENSE_FIRST])
@pytest.mark.usefixtures("compiled_planner")
def test_layers_keep_their_numbers_in_every_placement(tmp_path: Path, moe_layers: tuple[int, ...]):
    trace, said = recorded(tmp_path, moe_layers)
    assert TraceReader(trace).head.moe_layers == list(moe_layers)
    for layer in set(range(ROWS)) - set(moe_layers):
        assert str(layer) in said.replace("0 to 2", "0, 1, 2")
    rows = yaml.safe_load(planned(trace, "tensorrt-llm"))["initial_global_assignments"]
    assert tuple(rows) == moe_layers
    expert_map = json.loads(planned(trace, "vllm-ascend"))
    assert tuple(layer["layer_id"] for layer in expert_map["layer_list"]) == moe_layers
    table = json.loads(planned(trace, "sglang"))["physical_to_logical_map"]
    assert len(table) == moe_layers[-1] + 1
    for number, row in enumerate(table):
        assert row == rows.get(number, list(range(EXPERTS)))


def test_a_last_layer_without_experts_is_named_with_the_option_that_sglang_needs(tmp_path: Path):
    _, said = recorded(tmp_path, INTERLEAVED)
    assert f"--layers {ROWS}" in said
    assert "--layers" not in recorded(tmp_path, DENSE_FIRST)[1]


@pytest.mark.usefixtures("compiled_planner")
def test_a_first_layer_that_contradicts_the_file_is_refused(tmp_path: Path):
    trace, _ = recorded(tmp_path, INTERLEAVED)
    source, target = tmp_path / "record.json", tmp_path / "again.eptrace"
    done = run("convert", str(source), str(target), "--top-k", "2", "--first-moe-layer", "1")
    assert done.exit_code == 2
    assert "2, 4, 6, which --first-moe-layer 1 contradicts" in done.stderr
    assert not target.exists()
    options = ("--ep-size", "2", "--redundant", "0", "--to", "sglang", "-o", str(tmp_path / "p"))
    done = run("plan", str(trace), *options, "--first-moe-layer", "3")
    assert done.exit_code == 2
    assert "which --first-moe-layer 3 contradicts" in done.stderr
    assert planned(trace, "sglang", "--first-moe-layer", "2")


@pytest.mark.usefixtures("compiled_planner")
def test_rows_of_layers_with_experts_alone_are_numbered_by_the_option(tmp_path: Path):
    """A file without a dense layer does not say which layers it has."""
    source, target = tmp_path / "record.json", tmp_path / "load.eptrace"
    source.write_text(json.dumps({"logical_count": counts((2, 3))[[2, 3]].tolist()}))
    assert run("convert", str(source), str(target), "--top-k", "2").exit_code == 0
    assert TraceReader(target).head.moe_layers == []
    rows = yaml.safe_load(planned(target, "tensorrt-llm", "--first-moe-layer", "5"))
    assert list(rows["initial_global_assignments"]) == [5, 6]
    output = tmp_path / "p"
    done = run("plan", str(target), "--ep-size", "2", "--to", "tensorrt-llm", "-o", str(output))
    assert "taken for 0 to 1 of the model" in done.stderr
    given = ("--top-k", "2", "--first-moe-layer", "7")
    assert run("convert", str(source), str(target), *given).exit_code == 0
    assert TraceReader(target).head.moe_layers == [7, 8]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((3, 3), "layer 3 behind layer 3"),
        ((-1, 2), "layer -1 behind"),
        ((1, 4096), "layer 4096, and 4095 is the last"),
    ],
)
def test_numbers_that_no_layers_have_are_refused(tmp_path: Path, layers, words: str):
    source = tmp_path / "map.json"
    devices = [{"device_id": 0, "device_expert": [0, 1]}]
    held = [{"layer_id": number, "device_count": 1, "device_list": devices} for number in layers]
    source.write_text(json.dumps({"moe_layer_count": 2, "layer_list": held}))
    done = run("convert", str(source), str(tmp_path / "p.json"), "--to", "sglang")
    assert done.exit_code == 2
    assert words in done.stderr


def test_layers_of_an_expert_map_may_come_in_any_order(tmp_path: Path):
    source, target = tmp_path / "map.json", tmp_path / "p.yaml"
    held = [
        {
            "layer_id": layer,
            "device_count": 1,
            "device_list": [{"device_id": 0, "device_expert": row}],
        }
        for layer, row in ((5, [1, 0]), (3, [0, 1]))
    ]
    source.write_text(json.dumps({"moe_layer_count": 2, "layer_list": held}))
    assert run("convert", str(source), str(target), "--to", "tensorrt-llm").exit_code == 0
    rows = yaml.safe_load(target.read_text())["initial_global_assignments"]
    assert rows == {3: [0, 1], 5: [1, 0]}
