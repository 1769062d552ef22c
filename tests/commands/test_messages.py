"""Every message of the offline commands on input that they refuse or take with a note, each by a real one.

`messages.txt` holds them. After a change on purpose, read what `WRITE_MESSAGES=1 scripts/test
tests/commands/test_messages.py` makes of it.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import run
from safetensors.numpy import save_file
from saved_states import PLACEMENT, STATE
from traces import head_of, write_trace

from ep_rebalance.formats import vllm_ascend
from ep_rebalance.load.state import save_state
from ep_rebalance.load.trace.head import encode_head

GOLDEN = Path(__file__).with_name("messages.txt")
CONVERT = ("IN", "out.eptrace")
TO_SGLANG = ("IN", "out.json", "--to", "sglang", "--ep-size", "2")
REPEATS_TO_STATE = ("IN", "out.npz", "--to", "state", "--ep-size", "2", "--like", "IN")
IDS = np.random.default_rng(0).permuted(np.tile(np.arange(8), (300, 2, 1)), axis=2)[..., :2]
COUNTS = [[5, 1, 2, 3], [4, 4, 2, 1]]

Content = str | bytes | Callable[[Path], object]


def held(value: Any) -> str:
    return json.dumps({"logical_count": value})


def array(value: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.asarray(value))


def changed(change: Callable[[np.ndarray], None]) -> Callable[[Path], object]:
    ids = IDS.copy()
    change(ids)
    return array(ids)


def sets(index: Any, value: int) -> Callable[[np.ndarray], None]:
    return lambda ids: ids.__setitem__(index, value)


def statistics(meta: str, **tensors: np.ndarray) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "meta_info.json").write_text(meta)
        if tensors:
            save_file(tensors, folder / "rank0.safetensors")

    return write


def trace(**changes: Any) -> Callable[[Path], object]:
    """Without settings, of which new ones would put records elsewhere."""
    head = head_of(**{"config": {}} | changes)
    return lambda path: write_trace(path.parent, head, 2).rename(path)


def damaged(at: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        trace()(path)
        content = bytearray(path.read_bytes())
        content[at] ^= 255
        path.write_bytes(content)

    return write


def cut_off(path: Path) -> None:
    """Its writer died amid the first snapshot."""
    write_trace(path.parent, head_of(), 1).rename(path)
    path.write_bytes(path.read_bytes()[:-8])


def converted(path: Path) -> None:
    (path.parent / "source.json").write_text(held(COUNTS))
    assert (
        run("convert", str(path.parent / "source.json"), str(path), "--top-k", "2").exit_code == 0
    )


def expert_map(**changes: Any) -> str:
    return json.dumps(json.loads(vllm_ascend.placement_text(PLACEMENT, (0, 1, 5))) | changes)


def beside(content: Content, name: str, text: str) -> Callable[[Path], object]:
    """A file, and another in its folder."""

    def write(path: Path) -> None:
        put(content, path)
        (path.parent / name).write_text(text)

    return write


def put(content: Content, path: Path) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def answered(**choice: Any) -> str:
    return json.dumps({"choices": [choice]})


KIND = '{"num_experts_per_token": 2}'
ON = ("--hardware", "h100-sxm")
ROWS = "initial_global_assignments"
CASES: dict[str, list[tuple[str, Content, tuple[str, ...]]]] = {
    "convert: what a file is": [
        ("no.json", lambda path: None, CONVERT),
        ("a.json", lambda path: os.mkfifo(path), CONVERT),
        ("a.parquet", b"PAR1....", CONVERT),
        ("a.h5", b"\x89HDF\r\n\x1a\n", CONVERT),
        ("a.json.zst", b"\x28\xb5\x2f\xfd....", CONVERT),
        ("a.json.xz", b"\xfd7zXZ\0", CONVERT),
        ("a.pkl", pickle.dumps(COUNTS), CONVERT),
        ("a.db", b"SQLite format 3\0", CONVERT),
        ("a.pdf", b"%PDF-1.7", CONVERT),
        ("a.txt", "5 1 2 3", CONVERT),
        ("a.txt", "", CONVERT),
        ("a.eptrace", trace(), CONVERT),
        ("a.json.gz", gzip.compress(held(COUNTS).encode())[:-9], CONVERT),
        ("a.json", held(COUNTS).encode("utf-16"), CONVERT),
        ("a.json", b'{"a": "\xff"}', CONVERT),
    ],
    "convert: counts": [
        ("a.json", "{", CONVERT),
        ("a.json", '{"a": [1' + "0" * 5000 + "]}", CONVERT),
        ("a.json", "[" * 100_000, CONVERT),
        ("a.json", "[[1, 2]]", CONVERT),
        ("a.json", '{"records": 1, "last": 2}', CONVERT),
        ("a.json", '{"physical_to_logical_map": [[0, 1]]}', CONVERT),
        ("a.json", expert_map(), CONVERT),
        ("a.json", held([[1, 2], [3]]), CONVERT),
        ("a.json", held([[1, 2], [3, "x"]]), CONVERT),
        ("a.json", held([[1, 2], 3]), CONVERT),
        ("a.json", held(7), CONVERT),
        ("a.json", held([[1, 2], [3, -4]]), CONVERT),
        ("a.json", held([[0, 0]]), CONVERT),
        ("a.json", held(COUNTS), CONVERT),
        ("a.json", held([[2**33, 1]]), (*CONVERT, "--top-k", "1")),
        ("a.json", held(COUNTS), (*CONVERT, "--experts", "8")),
        ("a.json", held([[0, 0], [1, 2], [0, 0]]), (*CONVERT, "--top-k", "1")),
        ("a.json", held([[0, 0], [1, 2]]), (*CONVERT, "--first-moe-layer", "3")),
        ("a.npy", array(np.transpose(COUNTS)), CONVERT),
        ("a.npy", array(["x"]), CONVERT),
        ("a.npy", array(COUNTS), (*CONVERT, "--axes", "WLE")),
        ("a.npy", b"\x93NUMPY", CONVERT),
        ("a.npz", lambda path: np.savez(path, a=COUNTS, b=COUNTS), CONVERT),
        ("a.npz", lambda path: np.savez(path, a=COUNTS), (*CONVERT, "--key", "b")),
        ("a.npz", lambda path: save_state(path, STATE), CONVERT),
        ("a.pt", b"PK\x03\x04", CONVERT),
        ("a.pt", lambda path: torch.save({"a": 1}, path), CONVERT),
        ("a.csv", "1,2,3,4\n", CONVERT),
        ("a.csv", "layer,count\n", CONVERT),
        ("a.csv", "layer,expert,count,snapshot,step\n", CONVERT),
        ("a.csv", "1,2,3\n1,2,4\n", CONVERT),
        ("a.csv", "1,2,x\n", CONVERT),
        ("a.csv", "1,2,3\n1,2\n", CONVERT),
        ("a.csv", '1,"2,3', CONVERT),
        ("a.csv", "1,2,0\n", CONVERT),
        ("a.csv", "3,0,7\n3,2,7\n", (*CONVERT, "--top-k", "1")),
        ("a.csv", "3,0,7\n3,2,7\n", (*CONVERT, "--experts", "2")),
        ("a", statistics("{}"), CONVERT),
        ("a", statistics(KIND), CONVERT),
        ("a", statistics(KIND, wrong=np.ones(2, int)), CONVERT),
        ("a", statistics(KIND, **{"1_3": np.ones(2, int), "2_4": np.ones(2, int)}), CONVERT),
    ],
    "convert: expert ids": [
        ("a.npy", array(IDS), CONVERT),
        ("a.npy", array(IDS[:200]), (*CONVERT, "--experts", "8")),
        ("a.npy", array(IDS.transpose(1, 0, 2)), (*CONVERT, "--model", "mixtral-8x7b")),
        ("a.npy", array(IDS), (*CONVERT, "--experts", "6")),
        ("a.npy", array(IDS), (*CONVERT, "--experts", "8", "--tokens-per-snapshot", "200")),
        ("a.npy", array(IDS), (*CONVERT, "--top-k", "3")),
        ("a.npy", array(IDS), (*CONVERT, "--model", "mixtral-8x7b", "--experts", "6")),
        ("a.npy", array(IDS), (*CONVERT, "--axes", "KLT")),
        ("a.npy", array(IDS), (*CONVERT, "--axes", "XYZ")),
        ("a.npy", array(IDS * 100), CONVERT),
        ("a.npy", array(np.repeat(IDS, 200, axis=1)), CONVERT),
        ("a.npy", changed(sets((slice(0, 9), 0, 1), -2)), (*CONVERT, "--experts", "8")),
        ("a.npy", changed(sets(slice(0, 9), 8)), CONVERT),
        ("a.npy", changed(sets((slice(0, 9), 0, 1), 8)), CONVERT),
        ("a.npy", changed(sets((slice(0, 9), 0, 1), -1)), (*CONVERT, "--experts", "8")),
        ("a.npy", changed(sets(slice(0, 9), -1)), (*CONVERT, "--experts", "8")),
        ("a.npy", changed(sets(slice(0, 9), 0)), (*CONVERT, "--experts", "8")),
        ("a.npy", array(np.zeros((9, 2, 2), int)), CONVERT),
        ("a.npz", lambda path: np.savez(path, a=IDS, b=IDS[:, :1]), CONVERT),
        ("a.npz", lambda path: np.savez(path, a=IDS, b=IDS[0]), CONVERT),
        ("a.jsonl", "{", CONVERT),
        ("a.jsonl", "{}", CONVERT),
        ("a.jsonl", answered(text="a"), CONVERT),
        ("a.jsonl", answered(routed_experts="@"), CONVERT),
    ],
    "convert: placements": [
        ("a.json", '{"a": 1}', TO_SGLANG),
        ("a.json", '{"physical_to_logical_map": [[0, 1]]}', TO_SGLANG[:-2]),
        ("a.json", '{"physical_to_logical_map": [[0, 1, 2]]}', TO_SGLANG),
        ("a.json", '{"physical_to_logical_map": [[0, 2]]}', TO_SGLANG),
        ("a.json", '{"physical_to_logical_map": [[0, 1], [0]]}', TO_SGLANG),
        ("a.json", '{"physical_to_logical_map": [[0, -1]]}', TO_SGLANG),
        ("a.json", '{"physical_to_logical_map": [[[0, 1]]]}', TO_SGLANG),
        ("a.json", '{"physical_to_logical_map": [[0, 0, 1, 2]]}', TO_SGLANG),
        ("a.json", '{"layer_list": "device_expert"}', TO_SGLANG),
        ("a.json", expert_map(moe_layer_count=2), TO_SGLANG),
        ("a.json", expert_map().replace('"device_id": 1', '"device_id": 2'), TO_SGLANG),
        ("a.json", expert_map().replace('"layer_id": 5', '"layer_id": 1'), TO_SGLANG),
        ("a.json", expert_map().replace('"layer_id": 5', '"layer_id": 5000'), TO_SGLANG),
        ("a.json", expert_map(), (*TO_SGLANG, "--layers", "4")),
        ("a.json", expert_map(), (*TO_SGLANG, "--first-moe-layer", "2")),
        ("a.json", expert_map(), ("IN", "out.npz", "--to", "state")),
        ("a.json", expert_map(), ("IN", "out.json")),
        ("a.yaml", "a: [", TO_SGLANG),
        ("a.yaml", "a: 1", TO_SGLANG),
        ("a.yaml", yaml.safe_dump({ROWS: {"a": [0]}}), TO_SGLANG),
        ("a.yaml", yaml.safe_dump({ROWS: {0: [0, 1]}, "num_slots": 3}), TO_SGLANG),
        ("a.yaml", yaml.safe_dump({ROWS: {0: [0, 0, 1, 2]}}), REPEATS_TO_STATE),
        ("a.npz", b"PK\x03\x04", TO_SGLANG),
        ("a.csv", "1,2,3\n", TO_SGLANG),
        ("a.eptrace", lambda path: path.write_bytes(encode_head(head_of())), TO_SGLANG),
        ("a.json", expert_map(), (*CONVERT, "--phase", "both")),
    ],
    "plan": [
        ("a.eptrace", converted, ("IN", "--to", "sglang", "-o", "out.json")),
        ("a.eptrace", converted, ("IN", "--to", "sglang", "-o", "out.json", "--ep-size", "3")),
        ("a.eptrace", cut_off, ("IN", "--to", "sglang", "-o", "out.json")),
        ("a", lambda path: path.mkdir(), ("IN", "--to", "sglang", "-o", "out.json")),
        ("a.json", held(COUNTS), ("IN", "--to", "sglang", "-o", "out.json")),
    ],
    "replay": [
        ("a.eptrace", damaged(30), ("IN",)),
        ("a.eptrace", damaged(-1), ("IN",)),
        ("a.eptrace", lambda path: path.write_bytes(encode_head(head_of())[:40]), ("IN",)),
        ("a.eptrace", converted, ("IN",)),
        ("a.eptrace", trace(), ("IN", "--eplb", "step_interval=10")),
        ("a.eptrace", trace(), ("IN", "--set", "planner")),
    ],
    "inspect": [
        ("a.npz", b"PK\x03\x04", ("IN",)),
        ("a.txt", "hallo", ("IN",)),
        ("a.txt", "hallo", ("IN", "--watch")),
    ],
    "advise": [
        ("a.eptrace", trace(), ("IN",)),
        ("a.eptrace", trace(), ("IN", "--hardware", "h1000")),
        ("a.eptrace", converted, ("IN", *ON)),
        ("a.eptrace", converted, ("IN", *ON, "--expert-bytes", "1000")),
        ("a.eptrace", beside(converted, "o.json", '{"num_experts": 8}'), ("IN", *ON, "--model", "o.json")),
        ("a.eptrace", beside(converted, "o.json", '{"num_experts": 4}'), ("IN", *ON, "--model", "o.json")),
        ("a.eptrace", beside(converted, "o.json", "{"), ("IN", *ON, "--model", "o.json")),
        ("a.eptrace", converted, ("IN", *ON, "--model", "no/such-model")),
        ("a.eptrace", beside(trace(), "own.yaml", "a: ["), ("IN", "--hardware", "own.yaml")),
        ("a.eptrace", beside(trace(), "own.yaml", "a: 1"), ("IN", "--hardware", "own.yaml")),
        ("a.eptrace", beside(trace(), "own.yaml", "a: {flops: 1}"), ("IN", "--hardware", "own.yaml")),
        ("a.eptrace", beside(trace(), "own.yaml", "{}"), ("IN", "--hardware", "own.yaml")),
        ("a.eptrace", trace(), ("IN", *ON, "--gpus", "1")),
        ("a", lambda path: path.mkdir(), ("IN", *ON)),
        ("a.json", held(COUNTS), ("IN", *ON)),
    ],
    "doctor": [
        ("a.json", "{", ("--model", "IN")),
        ("a.json", "[]", ("--model", "IN")),
        ("a.json", '{"quantization_config": 4}', ("--model", "IN")),
        ("a", lambda path: path.mkdir(), ("--model", "IN")),
        ("a.yaml", "", ("--model", "no/such-model")),
        ("a.yaml", "a: [", ("--config", "IN")),
        ("a.yaml", "- 1", ("--config", "IN")),
        ("a.yaml", "planer: {}", ("--config", "IN")),
        ("a.yaml", "planner: {redundant_experts: -1}", ("--config", "IN")),
        ("a.yaml", "state: {path: /none/state.npz}", ("--config", "IN")),
        ("a.yaml", "", ("--server", "http://127.0.0.1:9")),
        ("a.yaml", "", ("--server", "127.0.0.1:9")),
    ],
    "status": [
        ("a.yaml", "", ("http://127.0.0.1:9",)),
        ("a.yaml", "", ("127.0.0.1:9",)),
    ],
    "record": [
        ("a.txt", "\n", ("http://127.0.0.1:9", "--prompts", "IN", "-o", "out.eptrace", "--model", "m")),
        ("a.jsonl", "{", ("http://127.0.0.1:9", "--prompts", "IN", "-o", "out.eptrace", "--model", "m")),
        ("a.jsonl", "{}", ("http://127.0.0.1:9", "--prompts", "IN", "-o", "out.eptrace", "--model", "m")),
        ("a.txt", "hallo", ("http://127.0.0.1:9", "--prompts", "IN", "-o", "out.eptrace")),
        ("a.txt", "hallo", ("127.0.0.1:9", "--prompts", "IN", "-o", "out.eptrace")),
        ("a.txt", "hallo", ("http://127.0.0.1:9", "--prompts", "IN", "-o", "out.json")),
    ],
}  # fmt: skip


def said(
    command: str, folder: Path, name: str, content: Content, arguments: tuple[str, ...]
) -> str:
    """What the command says on stderr, with paths as in IN and DIR."""
    folder.mkdir()
    path = folder / name
    put(content, path)
    here = {"IN", *(one.name for one in folder.iterdir())}
    options = [
        str(folder / one.replace("IN", name)) if one in here or one.startswith("out.") else one
        for one in arguments
    ]
    done = run(command, *options)
    assert done.exit_code in (0, 1, 2), (name, arguments, done.exc_info)
    text = (told_by_doctor(done.stdout) if command == "doctor" else done.stderr).replace(
        f"{folder}/", ""
    )
    return re.sub(r"(?m)^(out\.\S+: .*(snapshots|for \S+$)|imbalance).*\n?", "", text)


def told_by_doctor(lines: str) -> str:
    """Of the model, the settings and the server; what it says of the machine is another on each."""
    found = re.findall(r"(?m)^problem +(model|settings|state.path|server) +(.+)\n +(.+)", lines)
    return "".join(f"{check}: {problem}\n  {remedy}\n" for check, problem, remedy in found)


def shown(part: str, folder: Path) -> str:
    """The messages of a part of CASES, each under what was asked."""
    lines = []
    for number, (name, content, arguments) in enumerate(CASES[part]):
        text = said(part.partition(":")[0], folder / str(number), name, content, arguments)
        asked = " ".join(name if one == "IN" else one for one in arguments)
        lines.append(f"$ {part.partition(':')[0]} {asked}\n{text}")
    return f"# {part}\n\n" + "\n".join(lines)


@pytest.mark.parametrize("part", CASES)
@pytest.mark.usefixtures("compiled_planner")
def test_messages_are_those_that_were_read_aloud(part: str, tmp_path: Path):
    text = shown(part, tmp_path)
    golden = GOLDEN.read_text().split("\n\f\n") if GOLDEN.exists() else []
    by_part = {page.partition("\n")[0]: page for page in golden}
    if os.environ.get("WRITE_MESSAGES"):
        by_part[f"# {part}"] = text
        pages = (by_part[f"# {one}"] for one in CASES if f"# {one}" in by_part)
        GOLDEN.write_text("\n\f\n".join(pages))
        return
    assert text == by_part[f"# {part}"]
