"""What is written is read back, and what is malformed is refused with its place."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from saved_states import PLACEMENT, STATE
from shapes import placements
from traces import head_of, records_of, write_trace

from ep_rebalance.formats import (
    FORMATS,
    arrays,
    contents,
    sglang,
    tensorrt_llm,
    trace,
    vllm_ascend,
)
from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading
from ep_rebalance.load.state import read_state, save_state
from ep_rebalance.load.trace import RecordedSnapshot, TraceReader
from ep_rebalance.load.trace.head import encode_head
from ep_rebalance.placement import Placement

COUNTS = np.arange(2 * 4 * 3).reshape(2, 4, 3) + 1
"""[snapshots, layers, experts]"""


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- placements


@given(placement=placements(), first=st.integers(0, 3), more=st.integers(0, 2))
@settings(max_examples=30)
def test_placements_go_round(tmp_path_factory, placement: Placement, first: int, more: int):
    folder = tmp_path_factory.mktemp("placements")
    layers = tuple(range(first, first + placement.num_layers))
    path = written(folder, "a.json", vllm_ascend.placement_text(placement, layers))
    assert vllm_ascend.read_placement(path, Reading()) == (placement, layers)
    path = written(folder, "t.yaml", tensorrt_llm.placement_text(placement, layers))
    assert tensorrt_llm.read_placement(path, Reading(num_ranks=placement.num_ranks)) == (
        placement,
        layers,
    )
    text = sglang.placement_text(placement, layers, layers[-1] + 1 + more)
    rows = json.loads(text)["physical_to_logical_map"]
    assert len(rows) == layers[-1] + 1 + more
    assert rows[first : first + placement.num_layers] == placement.slots_LP.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_has_the_functions_that_its_entry_says(name: str):
    one = FORMATS[name]
    module = import_module(one.module)
    assert callable(module.recognises)
    assert hasattr(module, "read_load") == one.reads_load
    assert hasattr(module, "read_placement") == one.reads_placement
    assert hasattr(module, "write_placement") == one.writes_placement


def test_sglangs_own_placement_is_read(tmp_path: Path):
    path = written(tmp_path, "s.json", sglang.placement_text(PLACEMENT, (0, 1, 2), 3))
    assert sglang.read_placement(path, Reading(num_ranks=2)) == (PLACEMENT, (0, 1, 2))


def test_dense_layers_get_the_trivial_row():
    rows = json.loads(sglang.placement_text(PLACEMENT, (2, 3, 5), 6))["physical_to_logical_map"]
    assert rows[0] == rows[1] == rows[4] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[" * 100_000, "a.json"),
        ("a.json", '{"physical_to_logical_map": [[0, 1], [0]]}', "_map[1] has 1 numbers"),
        ("a.json", '{"physical_to_logical_map": [[[0, 1]], [[1, 0]]]}', "3 dimensions"),
        ("a.yaml", "initial_global_assignments: {0: [[0, 1]], 1: [[1, 0]]}", "3 dimensions"),
        ("a.json", '{"physical_to_logical_map": [[0, 5], [1, 0]]}', "no slot holds expert"),
        ("a.json", '{"physical_to_logical_map": [[0, -1]]}', "[0][1] is -1"),
        (
            "a.json",
            '{"moe_layer_count": 2, "layer_list": [], "x": "device_expert"}',
            "for 0 layers",
        ),
        ("a.json", '{"layer_list": "device_expert"}', "not an expert map"),
        ("a.yaml", "initial_global_assignments: {a: [0]}", "not by layer number"),
        ("a.yaml", "num_slots: 3\ninitial_global_assignments: {0: [0, 1]}", "num_slots"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "not YAML"),
        ("a.yaml", "2026-13-01", "not YAML"),
        ("a.yaml", "initial_global_assignments: {0: &r [0, 1], 1: *r}", "line 1: aliases"),
        ("a.yaml", "!!timestamp none", "not YAML"),
        ("a.yaml", "[" * 100_000, "not YAML"),
        (
            "a.json",
            '{"physical_to_logical_map": [[1' + "0" * 5000 + "]]}",
            "number of thousands of digits",
        ),
        ("a.json", '{"physical_to_logical_map": [[0, 2147483646]]}', "no slot holds expert 1"),
        (
            "a.json",
            '{"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 1000000000000, '
            '"device_list": [{"device_id": 0, "device_expert": [0]}]}]}',
            "does not list devices",
        ),
        ("a.json", b"\xff\xff", "not UTF-8"),
        ("a.json", "{}".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (
            "a.json",
            '{"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": '
            '[{"device_id": 0, "device_expert": [0]}, {"device_id": 1, "device_expert": [1, 2, 3]}]}]}',
            "does not give 2 devices equally many experts",
        ),
    ],
)
def test_malformed_placements_are_refused(tmp_path: Path, name: str, content, words: str):
    path = written(tmp_path, name, content)
    target = tmp_path / "out.json"
    done = run("convert", str(path), str(target), "--to", "sglang", "--ep-size", "1")
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert words in done.stderr
    assert not target.exists()


def test_a_trace_whose_writer_died_at_once_is_one_sentence(tmp_path: Path):
    path = tmp_path / "x.eptrace"
    path.write_bytes(encode_head(head_of()))
    with pytest.raises(FormatError, match="holds no placement"):
        trace.read_placement(path, Reading())


def test_every_source_of_a_placement_reaches_every_target(tmp_path: Path):
    state, trace = tmp_path / "s.npz", write_trace(tmp_path, head_of(), 1)
    save_state(state, STATE)
    done = run("convert", str(state), str(tmp_path / "p.yaml"), "--to", "tensorrt-llm")
    assert done.exit_code == 0, done.stderr
    chain = [("p.yaml", "p.json", "vllm-ascend"), ("p.json", "q.json", "sglang")]
    for source, target, to in chain:
        options = ("--to", to, "--ep-size", "2")
        done = run("convert", str(tmp_path / source), str(tmp_path / target), *options)
        assert done.exit_code == 0, done.stderr
    back = ("--to", "state", "--like", str(state), "--ep-size", "2")
    done = run("convert", str(tmp_path / "q.json"), str(tmp_path / "b.npz"), *back)
    assert done.exit_code == 0, done.stderr
    again = read_state(tmp_path / "b.npz")
    assert again.placement == PLACEMENT
    assert again.header.generation == STATE.header.generation + 1
    wrong = run(
        "convert", str(trace), str(tmp_path / "c.npz"), "--to", "state", "--like", str(state)
    )
    assert "is for 3 layers, 6 slots, 2 ranks" in wrong.stderr
    assert "--like" in run("convert", str(trace), str(tmp_path / "c.npz"), "--to", "state").stderr
    assert "--to" in run("convert", str(trace), str(tmp_path / "c.json")).stderr


# --- load


def converted(tmp_path: Path, source: Path, *options: str) -> list[RecordedSnapshot]:
    target = tmp_path / "load.eptrace"
    done = run("convert", str(source), str(target), *options)
    assert done.exit_code == 0, done.stderr
    return [r for r in records_of(target) if isinstance(r, RecordedSnapshot)]


def recordings(tmp_path: Path, counts: np.ndarray) -> list[Path]:
    text = json.dumps({"logical_count": counts.tolist()})
    pt = tmp_path / "record.pt"
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, pt)
    return [written(tmp_path, "record.json", text), pt]


def test_sglangs_recordings_become_traces_without_the_dense_layers(tmp_path: Path):
    counts = COUNTS.copy()
    counts[:, [0, 2]] = 0
    for source in recordings(tmp_path, counts):
        snapshots = converted(tmp_path, source, "--top-k", "2", "--phase", "decode")
        assert len(snapshots) == 2
        for snapshot, expected in zip(snapshots, counts[:, [1, 3]], strict=True):
            assert not snapshot.counts_ALE[0].any()
            assert (snapshot.counts_ALE[1] == expected).all()
        head = TraceReader(tmp_path / "load.eptrace").head
        assert "SGLang" in head.origin
        assert head.moe_layers == [1, 3]


def test_an_aggregate_can_be_drawn_from(tmp_path: Path):
    source, _ = recordings(tmp_path, COUNTS[0])
    options = ("--top-k", "2", "--sample", "50", "--tokens-per-snapshot", "1000")
    snapshots = converted(tmp_path, source, *options)
    total = sum(snapshot.counts_ALE[0].astype(int) for snapshot in snapshots)
    assert (total.sum(axis=1) == 50 * 2000).all()
    shares = COUNTS[0] / COUNTS[0].sum(axis=1, keepdims=True)
    assert total / 100_000 == pytest.approx(shares, abs=0.01)
    again = converted(tmp_path, source, *options)
    assert all((a.counts_ALE == b.counts_ALE).all() for a, b in zip(snapshots, again, strict=True))
    assert "sampled" in TraceReader(tmp_path / "load.eptrace").head.origin


def statistics(folder: Path, counts: np.ndarray, ranks: int = 2) -> Path:
    """TensorRT-LLM's folder: iterations from 50, layers from 3, counts shared by the ranks."""
    folder.mkdir()
    meta = {"num_experts": counts.shape[2], "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(ranks):
        share = counts // ranks if rank else counts - counts // ranks * (ranks - 1)
        tensors = {
            f"{50 + i}_{3 + layer}": share[i, layer].astype(np.int64)
            for i in range(counts.shape[0])
            for layer in range(counts.shape[1])
        }
        save_file(tensors, folder / f"rank{rank}.safetensors")
        save_file(tensors, folder / f"rank{rank}_raw.safetensors")
    return folder


def test_tensorrt_llms_statistics_become_traces(tmp_path: Path):
    source = statistics(tmp_path / "statistics", COUNTS)
    snapshots = converted(tmp_path, source)
    assert len(snapshots) == 2
    for snapshot, expected in zip(snapshots, COUNTS, strict=True):
        assert (snapshot.counts_ALE[0] == expected).all()
    head = TraceReader(tmp_path / "load.eptrace").head
    assert (head.top_k, head.moe_layers) == (2, [3, 4, 5, 6])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("meta_info.json", b"{}", "num_experts_per_token"),
        ("meta_info.json", b"{", "num_experts_per_token"),
        ("meta_info.json", b'{"num_experts_per_token": Infinity}', "num_experts_per_token"),
        ("rank0.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "lacks layers"),
        ("rank0.safetensors", b"\xff" * 64, "not a file of tensors"),
    ],
)
def test_malformed_statistics_are_refused(tmp_path: Path, name: str, content: bytes, words: str):
    source = statistics(tmp_path / "statistics", COUNTS)
    save_file(
        {"50_3": np.ones(3, np.int64), "51_4": np.ones(3, np.int64)}, source / "rank1.safetensors"
    )
    (source / name).write_bytes(content)
    done = run("convert", str(source), str(tmp_path / "x.eptrace"))
    assert done.exit_code == 2, done.output
    assert words in done.stderr


@given(
    lengths=st.lists(st.integers(0, 30).filter(bool), min_size=1, max_size=4),
    size=st.integers(1, 20),
)
@settings(max_examples=20)
def test_expert_ids_are_counted_in_order(tmp_path_factory, lengths: list[int], size: int):
    draw = np.random.default_rng(sum(lengths))
    parts = {
        f"k{n}": draw.permuted(np.tile(np.uint8(range(6)), (count, 3, 1)), axis=2)[..., :2]
        for n, count in enumerate(lengths)
    }
    path = tmp_path_factory.mktemp("ids") / "ids.npz"
    np.savez(path, **parts)
    load = arrays.read_load(path, Reading(tokens_per_snapshot=size, experts=6))
    joined = np.concatenate(list(parts.values()))
    counts = list(load.counts)
    assert (load.top_k, load.layers, load.experts) == (2, 3, 6)
    assert len(counts) == (len(joined) // size or 1)
    for number, counts_LE in enumerate(counts):
        ids = joined[number * size : (number + 1) * size]
        for layer in range(3):
            expected = np.bincount(ids[:, layer].ravel(), minlength=load.experts)
            assert (counts_LE[layer] == expected).all()


def test_keys_of_expert_ids_can_be_chosen(tmp_path: Path):
    path = tmp_path / "ids.npz"
    ids = np.zeros((4, 1, 1), np.uint8)
    np.savez(path, **{"law|a": ids, "math|b": ids + 1})
    (snapshot,) = converted(tmp_path, path, "--key", "math|*", "--tokens-per-snapshot", "4")
    assert snapshot.counts_ALE[0].tolist() == [[0, 4]]
    none = run("convert", str(path), str(tmp_path / "x.eptrace"), "--key", "music")
    assert "no array whose name matches" in none.stderr


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"logical_count": [[1, 2], [3]]}', "logical_count[1] has 1 numbers"),
        ("a.json", '{"logical_count": [[1, 2], [3, -4]]}', "logical_count[1][1] is -4"),
        ("a.json", '{"logical_count": [[1, 2.5]]}', "[0][1] is 2.5"),
        (
            "a.json",
            '{"logical_count": [[[1, 4294967296]]]}',
            "layer 0, expert 1 has 4294967296 tokens",
        ),
        ("a.json", '{"logical_count": [[[1, 1e16]]]}', "[0][0][1] is 1e+16"),
        ("a.json", '{"logical_count": [[1, NaN]]}', "is nan"),
        ("a.json", '{"logical_count": [[0, 0]]}', "no layer with tokens"),
        ("a.json", '{"logical_count": 7}', "has shape ()"),
        ("a.json", '{"logical_count": [["x"]]}', "[0][0] is 'x', not a number"),
        ("a.json", '{"other": 1}', "no logical_count"),
        ("a.json", "[1]", "is a list; name it"),
        ("a.pt", b"PK\x03\x04 nothing", "not what torch.save"),
        ("a.npz", b"PK\x03\x04 nothing", "not what numpy.save"),
        ("a.npy", b"\x93NUMPY", "not what numpy.save"),
    ],
)
def test_malformed_recordings_are_refused(tmp_path: Path, name: str, content, words: str):
    path, target = written(tmp_path, name, content), tmp_path / "load.eptrace"
    done = run("convert", str(path), str(target), "--top-k", "2")
    assert done.exit_code == 2, done.output
    assert str(path) in done.stderr
    assert words in done.stderr
    assert not target.exists()


def bomb(path: Path) -> Path:
    """An archive of a few bytes that declares an array of 4 GiB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ids.npy", b"")
    content = bytearray(path.read_bytes())
    size = content.rindex(b"PK\x01\x02") + 24
    content[size : size + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    return path


def test_what_would_unpack_beyond_all_bounds_is_not_unpacked(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(contents, "MAX_ARRAY_BYTES", 1 << 30)
    for path in (bomb(tmp_path / "a.npz"), bomb(tmp_path / "a.pt")):
        with pytest.raises(FormatError, match="unpacks to 4294967280 bytes"):
            arrays.read_load(path, Reading())


def test_a_tensor_that_repeats_a_few_bytes_without_end_is_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"logical_count": torch.zeros(1).expand(1 << 14, 1 << 10, 1 << 10)}, path)
    with pytest.raises(
        FormatError, match=r"logical_count has shape .*, more than 4294967296 bytes"
    ):
        arrays.read_load(path, Reading())


@pytest.mark.parametrize(
    ("place", "reason"), [(38, "is not stored as a file"), (16, "has another checksum")]
)
def test_a_tensor_that_torch_would_not_read_is_refused(tmp_path: Path, place: int, reason: str):
    """It would take what is in memory for the tensor's numbers."""
    path = tmp_path / "a.pt"
    torch.save(torch.arange(48).reshape(8, 3, 2), path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"a/data/0", content.index(b"PK\x01\x02")) - 46
    content[entry + place] ^= 0x10  # attributes, or the checksum
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"its record a/data/0 {reason}"):
        arrays.read_load(path, Reading(axes="TLK"))


def test_a_tensor_that_is_much_larger_than_its_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save([torch.zeros(1, dtype=torch.uint8).expand(1 << 13, 1 << 10, 1 << 4)], path)
    with pytest.raises(FormatError, match=r"\[0\] unpacks to 134217728 bytes or more, over 100"):
        arrays.read_load(path, Reading(axes="TLK"))


def test_layers_and_experts_that_no_model_has_are_not_counted(tmp_path: Path):
    path = tmp_path / "a.npy"
    np.save(path, np.full((1, 1 << 20, 1), 59_999, np.uint16))
    with pytest.raises(FormatError, match="1048576 layers of 60000 experts"):
        arrays.read_load(path, Reading(axes="TLK"))


def test_yaml_that_would_take_minutes_is_not_read(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"#" * ((16 << 20) + 1))
    with pytest.raises(FormatError, match="16777217 bytes"):
        tensorrt_llm.read_placement(path, Reading(num_ranks=1))


def test_no_file_runs_code(tmp_path: Path):
    trap = tmp_path / "trap"
    torch.save({"logical_count": _Payload(trap)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"logical_count": _Payload(trap)}))
    np.savez(tmp_path / "c.npz", ids=np.array([_Payload(trap)], dtype=object))
    for name in ("a.pt", "b.pt", "c.npz"):
        done = run("convert", str(tmp_path / name), str(tmp_path / "x.eptrace"), "--top-k", "2")
        assert done.exit_code == 2, done.output
        assert not trap.exists()


def test_what_is_not_told_is_asked_for(tmp_path: Path):
    source, _ = recordings(tmp_path, COUNTS)
    target = str(tmp_path / "x.eptrace")
    assert "--top-k" in run("convert", str(source), target).stderr
    assert "prefill, decode" in run("convert", str(source), target, "--phase", "both").stderr
    placement = written(
        tmp_path, "t.yaml", yaml.safe_dump({"initial_global_assignments": {0: [0]}})
    )
    done = run("convert", str(placement), str(tmp_path / "y.json"), "--to", "sglang")
    assert "--ep-size" in done.stderr
    converted(tmp_path, source, "--top-k", "2")
    assert "--ep-size" in run("replay", str(tmp_path / "load.eptrace")).stderr


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), int), np.zeros((2, 2, 2)), np.full((1, 1, 1), -1)]
)
def test_arrays_that_are_no_expert_ids_are_refused(tmp_path: Path, array: np.ndarray):
    path = tmp_path / "ids.npy"
    np.save(path, array)
    with pytest.raises(FormatError, match=r"ids\.npy"):
        arrays.read_load(path, Reading())


@pytest.mark.skipif("EP_REBALANCE_DATA" not in os.environ, reason="needs EP_REBALANCE_DATA")
def test_published_recordings_become_traces(tmp_path: Path):
    folder = Path(os.environ["EP_REBALANCE_DATA"]) / "deepseek-logical-counts"
    for source in sorted(folder.glob("*.json")):
        (snapshot,) = converted(tmp_path, source)
        expected = np.array(json.loads(source.read_text())["logical_count"])[3:]
        assert (snapshot.counts_ALE[0] == expected).all()
