"""What a file or a server says is shown as it is: it commands neither a terminal nor a shell."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from command_line import run, server
from saved_states import STATE
from statuses import make_status
from traces import REPLAYED, head_of, write_trace

from ep_rebalance.load.state import save_state
from ep_rebalance.load.trace import head as trace_head
from ep_rebalance.telemetry.metrics import encode

COMMANDS = "\x1b]0;gone\x07\x1b[2J[/bold]:smile:\x9b"
SHOWN = r"\x1b]0;gone\x07\x1b[2J[/bold]:smile:\x9b"


def written_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> Path:
    """A trace whose texts were not spelt out when they were written."""
    with monkeypatch.context() as patched:
        patched.setattr(trace_head, "printable", lambda value: value)
        return write_trace(tmp_path, msgspec.structs.replace(REPLAYED, **changes), 4)


def test_a_trace_is_inspected_replayed_and_reported(tmp_path: Path, monkeypatch):
    path = written_by_another(tmp_path, monkeypatch, model=COMMANDS, origin=COMMANDS)
    assert b"\\u001b" in path.read_bytes()
    report = tmp_path / "report.html"
    for arguments in (
        ("inspect", str(path)),
        ("replay", str(path), "--format", "table"),
        ("replay", str(path), "--format", "markdown", "--report", str(report)),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        assert "\x1b" not in done.output
    shown = run("inspect", str(path), COLUMNS="200").stdout
    assert f"trace of {SHOWN}" in shown
    assert "\x1b" not in report.read_text()


def test_a_trace_that_is_recorded_spells_them_out(tmp_path: Path):
    path = write_trace(tmp_path, head_of(model="caf\udce9"), 1)
    assert r"caf\\udce9" in path.read_bytes().decode("latin-1")


def test_a_model_in_a_command_is_one_word(tmp_path: Path):
    path = write_trace(tmp_path, msgspec.structs.replace(REPLAYED, model="a; rm -rf /"), 8)
    done = run("advise", str(path), "--hardware", "h100-sxm", "--json", "--jobs", "1")
    assert done.exit_code == 0, done.output
    commands = [row["command"] for row in json.loads(done.stdout)["rows"]]
    assert commands
    assert all(shlex.split(command)[2] == "a; rm -rf /" for command in commands)


def test_a_state_is_inspected(tmp_path: Path):
    identity = msgspec.structs.replace(STATE.header.identity, model=COMMANDS)
    header = msgspec.structs.replace(STATE.header, identity=identity)
    path = tmp_path / "s.npz"
    save_state(path, replace(STATE, header=header))
    done = run("inspect", str(path), COLUMNS="200")
    assert f"state of {SHOWN}" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_server_is_asked():
    status = make_status()
    status.model = status.message = COMMANDS
    with server(200, encode(status)) as (url, _):
        done = run("status", url, COLUMNS="200")
    assert done.exit_code == 0, done.output
    assert SHOWN in done.stdout
    assert "\x1b" not in done.stdout


def test_an_error_names_what_a_file_holds(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, **{f"{COMMANDS}{number}": np.ones((2, 4)) for number in (1, 2)})
    done = run("convert", str(path), str(tmp_path / "x.eptrace"), "--top-k", "1")
    assert done.exit_code == 2
    assert SHOWN in done.stderr
    assert "\x1b" not in done.stderr


def test_a_server_of_another_version_is_shown_as_far_as_it_tells():
    sent = json.loads(encode(make_status()))
    needed = ("started", "info", "model", "layers", "experts", "ep_size", "slots", "config")
    earlier = {name: sent[name] for name in needed} | {"info": {"mode": "observe"}, "later": [1]}
    with server(200, json.dumps(earlier).encode()) as (url, _):
        done, found = run("status", url), run("status", url, "--json")
        doctor = run("doctor", "--server", url)
    assert done.exit_code == 0, done.output
    assert "observe, not told" in done.stdout
    assert json.loads(found.stdout) == earlier
    assert "mode observe" in doctor.stdout


def test_numbers_that_cannot_be_leave_the_others_shown():
    sent = json.loads(encode(make_status())) | {
        "self_test_seconds": None,
        "expert_time": {"low": 1},
    }
    with server(200, json.dumps(sent).encode()) as (url, _):
        done = run("status", url)
    assert done.exit_code == 0, done.output
    assert "it took 0.0 s" in done.stdout


def test_numbers_without_end_leave_the_others_shown():
    endless = int("9" * 4300)
    sent = json.loads(encode(make_status()))
    sent |= {"rank_tokens": [endless], "migrated_bytes": {"local": endless, "intranode": endless}}
    with server(200, json.dumps(sent).encode()) as (url, _):
        done, found = run("status", url), run("status", url, "--json")
    assert done.exit_code == 0, done.output
    assert "2 committed" in done.stdout
    assert json.loads(found.stdout)["rank_tokens"] == [endless]


@pytest.mark.parametrize("depth", [500, 100_000])
def test_what_is_nested_without_end_is_refused(tmp_path: Path, monkeypatch, depth: int):
    nested = "[" * depth + "]" * depth
    with server(200, f'{{"config": {nested}}}'.encode()) as (url, _):
        assert "did not answer with a status" in run("status", url).stderr
    text = msgspec.json.encode(head_of()).replace(
        b'"config":{', b'"config":{"a":%b,' % nested.encode()
    )
    text += b" " * (-len(text) % 8)
    sizes = np.array([len(text), trace_head.checksum_of_head(text)], "<u8")
    path = tmp_path / "load.eptrace"
    path.write_bytes(trace_head.MAGIC + sizes.tobytes() + text)
    done = run("inspect", str(path))
    assert done.exit_code == 2, done.output
    assert str(path) in done.stderr


def test_a_name_of_a_file_or_of_an_array_commands_no_terminal(tmp_path: Path):
    path = tmp_path / "a.npz"
    ids = np.arange(24).reshape(3, 4, 2) % 5
    np.savez(path, **{"x\x1b]0;gone\x07": ids})
    done = run("convert", str(path), str(tmp_path / "\x1b[31m.eptrace"))
    assert done.exit_code == 0, done.output
    assert r"note: x\x1b]0;gone\x07, (3, 4, 2), is taken as" in done.stderr
    assert r"\x1b[31m.eptrace: 1 snapshots" in done.stderr
    assert "\x1b" not in done.output


def result_of(folder: Path, name: str, policy: str) -> str:
    """A replay's result with one row."""
    path = write_trace(folder, REPLAYED, 4)
    done = run("replay", str(path), "--policy", "none", "--format", "json", "--jobs", "1")
    result = json.loads(done.stdout)
    result["rows"][0]["policy"] = policy
    (folder / name).write_text(json.dumps(result))
    return str(folder / name)


def test_a_comparison_is_neither_a_command_nor_a_formula(tmp_path: Path):
    path = result_of(tmp_path, "\x1b[31m.json", "=HYPERLINK(0)\n| x |")
    for form in ("table", "markdown"):
        done = run("replay", "--compare", path, path, "--format", form, COLUMNS="200")
        assert done.exit_code == 0, done.output
        assert r"\x1b" in done.stdout
        assert "\x1b" not in done.stdout
    assert not any(line.startswith("| x |") for line in done.stdout.splitlines())
    done = run("replay", "--compare", path, path, "--format", "csv")
    assert "\n\"'=HYPERLINK(0)" in done.stdout.replace("\r", "")


def test_the_reason_of_a_server_commands_no_terminal():
    with server(500, b"", reason="no\x1b[2J") as (url, _):
        for arguments in (("status", url), ("inspect", url), ("doctor", "--server", url)):
            done = run(*arguments)
            assert r"no\x1b[2J" in done.output
            assert "\x1b" not in done.output


def test_settings_of_another_version_are_refused_with_the_trace(tmp_path: Path):
    head = head_of(config={"planner": {"later": 1}}, plugin_version="9.9")
    path = write_trace(tmp_path, head, 4)
    for arguments in (
        ("replay", str(path), "--policy", "none", "--set", "planner.seed=1"),
        ("advise", str(path), "--hardware", "h100-sxm"),
        ("plan", str(path), "--to", "sglang", "-o", str(tmp_path / "o.json")),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert f"{path} was recorded with settings" in done.stderr
        assert "'planner.later'" in done.stderr
        assert "9.9" in done.stderr


@pytest.mark.parametrize(
    "model", ["a\n# b", "```<img src=x>`", "`\n\n<img src=x>`", "``\n<img src=x>"]
)
def test_a_model_is_no_markdown(tmp_path: Path, model: str):
    path = write_trace(tmp_path, msgspec.structs.replace(REPLAYED, model=model), 4)
    done = run("replay", str(path), "--policy", "none", "--format", "markdown", "--jobs", "1")
    assert done.exit_code == 0, done.output
    assert "\n# b" not in done.stdout
    outside = re.sub(r"(?<![`\\])`[^`\n]+`(?!`)", "", done.stdout)
    assert "<img" not in outside.replace(r"\<", "")
