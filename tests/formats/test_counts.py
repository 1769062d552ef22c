"""Counts of layers and experts in every kind of file come out alike, and keep to the limits of a trace."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from traces import records_of

from ep_rebalance.formats import arrays, contents, csv_counts
from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading
from ep_rebalance.load.trace import RecordedSnapshot, TraceReader

COUNTS = np.zeros((4, 6), int)
COUNTS[1] = [90, 10, 20, 30, 40, 10]
COUNTS[3] = [15, 25, 35, 45, 55, 25]
"""[layers, experts]; those with even numbers have no experts."""
CSV = "layer,expert,count\n" + "".join(
    f"{layer},{expert},{COUNTS[layer, expert]}\n" for layer in (3, 1) for expert in range(6)
)


def of_json(path: Path) -> None:
    path.write_text(json.dumps({"logical_count": COUNTS.tolist()}))


def of_npz(path: Path) -> None:
    np.savez(path, rank=0, logical_count=COUNTS)


def of_pt(path: Path) -> None:
    torch.save({"rank": 0, "logical_count": torch.from_numpy(COUNTS)[None]}, path)


FILES = {
    "a.json": of_json,
    "bom.json": lambda path: path.write_text(
        json.dumps({"logical_count": COUNTS.tolist()}), encoding="utf-8-sig"
    ),
    "a.npy": lambda path: np.save(path, COUNTS),
    "floats.npy": lambda path: np.save(path, COUNTS.astype(float)),
    "a.npz": of_npz,
    "a.pt": of_pt,
    "bare.pt": lambda path: torch.save(torch.from_numpy(COUNTS).to(torch.bfloat16), path),
    "a.csv": lambda path: path.write_text(CSV),
    "bom.csv": lambda path: path.write_text(CSV.replace("\n", "\r\n"), encoding="utf-8-sig"),
    "semicolons.csv": lambda path: path.write_text(CSV.replace(",", ";")),
    "tabs.tsv": lambda path: path.write_text(CSV.replace(",", "\t")),
    "nameless.csv": lambda path: path.write_text(CSV.partition("\n")[2]),
}


def converted(tmp_path: Path, source: Path, *options: str) -> list[RecordedSnapshot]:
    target = tmp_path / "load.eptrace"
    done = run("convert", str(source), str(target), "--top-k", "2", *options)
    assert done.exit_code == 0, (done.stderr, done.exc_info)
    return [r for r in records_of(target) if isinstance(r, RecordedSnapshot)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_counts_in_every_kind_of_file_come_out_alike(tmp_path: Path, name: str, packed: bool):
    source = tmp_path / name
    FILES[name](source)
    if packed:
        whole, source = source, tmp_path / f"{name}.gz"
        source.write_bytes(gzip.compress(whole.read_bytes()))
    (snapshot,) = converted(tmp_path, source)
    assert (snapshot.counts_ALE[0] == COUNTS[[1, 3]]).all()
    head = TraceReader(tmp_path / "load.eptrace").head
    assert (head.moe_layers, head.experts) == ([1, 3], 6)
    assert head.model == name.partition(".")[0]


def test_lines_of_several_snapshots_are_sorted(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("snapshot,expert,layer,tokens\n7,1,5,4\n2,0,5,3\n")
    first, second = converted(tmp_path, path, "--experts", "4")
    assert first.counts_ALE[0].tolist() == [[3, 0, 0, 0]]
    assert second.counts_ALE[0].tolist() == [[0, 4, 0, 0]]


def test_layers_of_lines_without_tokens_are_left_out_and_named(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("3,0,0\n3,1,0\n5,0,4\n5,1,6\n7,0,0\n")
    load = csv_counts.read_load(path, Reading())
    assert load.moe_layers == (5,)
    assert [counts.tolist() for counts in load.counts] == [[[4, 6]]]
    assert "layers 3, 7 have no tokens" in load.notes[0]
    assert "needs --layers 8" in load.notes[0]


def test_experts_without_a_line_are_named(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("0,0,5\n0,3,5\n")
    assert "1, 2, are taken to have no tokens" in csv_counts.read_load(path, Reading()).notes[0]


def test_counts_of_two_days_are_drawn_from_or_refused_with_their_place(tmp_path: Path):
    """An expert of a busy server passes 2^32 tokens."""
    source, target = tmp_path / "a.json", tmp_path / "load.eptrace"
    counts = COUNTS.astype(np.int64) * 10**8
    source.write_text(json.dumps({"logical_count": counts.tolist()}))
    done = run("convert", str(source), str(target), "--top-k", "2")
    assert done.exit_code == 2
    assert f"{source}: snapshot 0, layer 1, expert 0 has 9000000000 tokens" in done.stderr
    assert "--sample" in done.stderr
    assert not target.exists()
    snapshots = converted(tmp_path, source, "--sample", "40")
    total = sum(snapshot.counts_ALE[0].astype(int) for snapshot in snapshots)
    shares = COUNTS[[1, 3]] / COUNTS[[1, 3]].sum(axis=1, keepdims=True)
    assert total / total.sum(axis=1, keepdims=True) == pytest.approx(shares, abs=0.01)


def test_statistics_of_several_ranks_do_not_wrap_around(tmp_path: Path):
    from safetensors.numpy import save_file

    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts_per_token": 2}')
    for rank in range(2):
        save_file({"1_3": np.array([2**31 - 1, 5], np.int32)}, folder / f"rank{rank}.safetensors")
    (snapshot,) = converted(tmp_path, folder)
    assert snapshot.counts_ALE[0].tolist() == [[2**32 - 2, 10]]


def test_rows_that_do_not_add_up_alike_are_no_counts_of_layers(tmp_path: Path):
    path = tmp_path / "a.npy"
    np.save(path, COUNTS[[1, 3]].T)
    done = run("convert", str(path), str(tmp_path / "load.eptrace"), "--top-k", "2")
    assert "say what its axes are, e.g. --axes LE or TK" in done.stderr
    (snapshot,) = converted(tmp_path, path, "--axes", "EL")
    assert (snapshot.counts_ALE[0] == COUNTS[[1, 3]]).all()


def test_several_arrays_of_counts_are_chosen_from_by_name(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, first=COUNTS, second=2 * COUNTS)
    done = run("convert", str(path), str(tmp_path / "load.eptrace"), "--top-k", "2")
    assert "several arrays of counts, first, second; choose with --key" in done.stderr
    (snapshot,) = converted(tmp_path, path, "--key", "second")
    assert (snapshot.counts_ALE[0] == 2 * COUNTS[[1, 3]]).all()


def test_a_text_beside_arrays_is_no_array(tmp_path: Path):
    path = tmp_path / "a.npz"
    of_npz(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "counted on Monday")
    (snapshot,) = converted(tmp_path, path)
    assert (snapshot.counts_ALE[0] == COUNTS[[1, 3]]).all()


def test_what_should_be_an_array_and_does_not_begin_as_one_is_refused(tmp_path: Path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logical_count.npy", "NUMPY")
    with pytest.raises(FormatError, match=r"logical_count\.npy does not begin as an array"):
        arrays.read_load(path, Reading())


@pytest.mark.parametrize("name", ["a.json.gz", "a.csv.gz", "a.npy.gz"])
def test_a_small_file_that_unpacks_beyond_all_bounds_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(contents, "_PART_BYTES", 1 << 10)
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(FormatError, match="unpacks to more than 1048576 bytes"):
        contents.open_contents(path, 1 << 20)


@pytest.mark.parametrize("name", ["a.npy.gz", "a.npz", "twice.npz.gz"])
def test_a_file_that_is_much_larger_unpacked_is_refused(tmp_path: Path, monkeypatch, name: str):
    """Within the bounds on memory it would still take hours."""
    monkeypatch.setattr(contents, "_MAY_GROW_BYTES", 1 << 20)
    path, ids = tmp_path / name, np.zeros((1 << 17, 4, 4), np.uint8)
    held = io.BytesIO()
    np.savez_compressed(held, ids) if "npz" in name else np.save(held, ids)
    data = held.getvalue()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(FormatError, match=r"unpacks to \d+ bytes or more, over 100 times its size"):
        arrays.read_load(path, Reading())


@pytest.mark.parametrize("dtype", ["c16", "M8[D]", "U1", [("a", "f8")]])
def test_what_is_no_number_is_no_count(tmp_path: Path, dtype):
    path = tmp_path / "a.npz"
    np.savez(path, logical_count=np.zeros((2, 3), dtype))
    with pytest.raises(FormatError, match=r"logical_count is .*, which are no counts"):
        arrays.read_load(path, Reading())


def test_lines_far_fewer_than_their_counts_are_refused(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("layer,expert,count\n" + "".join(f"{layer},65535,1\n" for layer in range(100)))
    with pytest.raises(FormatError, match=r"too many for 100 lines; number experts from 0"):
        csv_counts.read_load(path, Reading())


def test_counts_that_no_trace_holds_are_not_written(tmp_path: Path):
    source, target = tmp_path / "a.npy", tmp_path / "a.eptrace"
    np.save(source, np.ones((2, 1 << 23), np.uint8))
    done = run("convert", str(source), str(target), "--axes", "LE", "--top-k", "1")
    assert done.exit_code == 2, done.output
    assert f"{source}: makes no trace: records of 201326592 bytes" in done.stderr
    assert not target.exists()


def test_damaged_gzip_is_refused_by_its_name(tmp_path: Path):
    path = tmp_path / "a.npy.gz"
    path.write_bytes(gzip.compress(b"\x93NUMPY" * 100)[:-9])
    done = run("convert", str(path), str(tmp_path / "load.eptrace"))
    assert f"{path}: is damaged gzip" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("layer,expert\n1,2\n", "line 1 names no column 'count'"),
        ("layer,expert,count\n1,2,3\n1,2,4\n", "line 3 has layer 1, expert 2 again"),
        ("layer,expert,count\n1,2,-3\n", "line 2 has count '-3'"),
        ("layer,expert,count\n1,2,3.5\n", "line 2 has count '3.5'"),
        (
            "layer,expert,count\n4096,2,3\n",
            "line 2 has layer '4096', not a whole number up to 4095",
        ),
        ("layer,expert,count\n1,2\n", "line 2 has 2 fields, for 3 columns"),
        ("1,2,3,4\n", "line 1 has 4 numbers"),
        ("layer,expert,count\n1,2,0\n", "no layer with tokens"),
        ('layer,expert,count\n1,"2,3\n', "is not CSV"),
        ("", "holds no counts"),
    ],
)
def test_malformed_csv_is_refused_with_its_line(tmp_path: Path, content: str, words: str):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(FormatError) as caught:
        csv_counts.read_load(path, Reading())
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_maps_with_an_expert_twice_on_a_rank_are_read_and_written_with_a_note(tmp_path: Path):
    """DeepSeek's EPLB makes such maps."""
    source, target = tmp_path / "p.yaml", tmp_path / "p.json"
    source.write_text("initial_global_assignments: {3: [0, 1, 1, 2, 3, 0], 4: [0, 1, 2, 3, 1, 0]}")
    done = run("convert", str(source), str(target), "--to", "vllm-ascend", "--ep-size", "2")
    assert done.exit_code == 0, done.stderr
    assert "1 of 12 slots repeat an expert of their rank" in done.stderr
    assert "expert 1 on rank 0 in row 0" in done.stderr
    assert "`ep-rebalance plan`" in done.stderr
    held = json.loads(target.read_text())["layer_list"]
    assert held[0]["device_list"][0]["device_expert"] == [0, 1, 1]
    done = run("convert", str(source), str(tmp_path / "s"), "--to", "state", "--ep-size", "2")
    assert done.exit_code == 2
