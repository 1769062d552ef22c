"""`ep-rebalance inspect`: what test_replay.py leaves out, above all `--watch`."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run, server
from saved_states import STATE
from statuses import make_status
from traces import contiguous, head_of, snapshots, write_trace

from ep_rebalance.commands import inspecting
from ep_rebalance.load.state import save_state
from ep_rebalance.load.trace import TraceWriter
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.telemetry.metrics import encode

HEAD = head_of()
ANSWER = encode(make_status())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[float]]:
    """Ends a watch with Ctrl-C after a number of looks; its pauses take no time."""

    def end_after(number: int) -> list[float]:
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(inspecting, "time", SimpleNamespace(sleep=sleep))
        return pauses

    return end_after


def test_a_watch_looks_again_until_it_is_ended(looks):
    pauses = looks(3)
    with server(200, ANSWER) as (url, requests):
        done = run("inspect", url, "--watch")
    assert done.exit_code == 0
    assert done.exception is None
    assert len(requests) == 3
    assert set(pauses) == {2.0}
    for words in ("rebalance, incremental", "generation", "imbalance without us", "experts moved"):
        assert words in done.stdout


def test_a_watch_shows_a_bar_for_each_rank(looks):
    looks(1)
    with server(200, ANSWER) as (url, _):
        shown = run("inspect", url, "--watch").stdout
    ranks = [line.split() for line in shown.splitlines() if line.strip().endswith(("0.67", "1.33"))]
    assert [(rank[0], rank[-1]) for rank in ranks] == [("0", "0.67"), ("1", "1.33")]


def test_a_watch_waits_for_a_server_that_does_not_answer(looks):
    looks(2)
    with server(503, b"{}") as (url, requests):
        done = run("inspect", url, "--watch")
    assert done.exit_code == 0
    assert len(requests) == 2
    assert "did not answer with a status" in done.stdout


def test_the_key_is_sent(looks):
    looks(1)
    with server(200, ANSWER) as (url, requests):
        run("inspect", url, "--api-key", "k1")
        run("inspect", url, VLLM_API_KEY="k2")
        run("inspect", url, "--watch", "--api-key", "k3")
    assert [key for _, key in requests] == ["Bearer k1", "Bearer k2", "Bearer k3"]
    assert {path for path, _ in requests} == {"/ep_rebalance/status"}


def test_a_live_server_as_json_is_its_answer():
    with server(200, ANSWER) as (url, _):
        assert json.loads(run("inspect", url, "--json").stdout) == json.loads(ANSWER)


def test_what_was_served_is_weighed_by_generation(tmp_path: Path):
    """Two generations: the imbalance is that of the tokens on the placement of their time."""
    first = contiguous(HEAD)
    turned = Placement(first.placement.slots_LP[:, [0, 4, 1, 5, 2, 6, 3, 7]], 8, 2)
    second = replace(first, placement=turned, generation=1, step=32)
    before, after = snapshots(HEAD, 2)
    writer = TraceWriter(tmp_path, "load", HEAD)
    for record in (first, before, second, replace(after, generation=1)):
        writer.write(record)
    writer.close()
    found = json.loads(run("inspect", str(tmp_path), "--json").stdout)
    weighted = pairs = 0.0
    for snapshot, served in ((before, first), (after, second)):
        load_LE = snapshot.counts_ALE.sum(axis=0, dtype=int)
        load_LR = served.placement.rank_load_LR(load_LE, served.quotas_LP)
        weighted, pairs = weighted + imbalance_L(load_LR) * load_LE.sum(1), pairs + load_LE.sum(1)
    assert found["generations"] == [[0, 0], [1, 32]]
    assert found["imbalance"] == pytest.approx((weighted / pairs).mean())
    assert found["worst_layers"][0][1] == pytest.approx((weighted / pairs).max())
    assert found["step_seconds"] == pytest.approx(0.05)
    assert "0 to 1, the last from step 32" in run("inspect", str(tmp_path)).stdout


def test_bytes_behind_the_last_whole_record_are_counted(tmp_path: Path):
    path = write_trace(tmp_path, HEAD, 3)
    whole = path.read_bytes()
    for cut in (0, 8, 100):
        path.write_bytes(whole[: len(whole) - cut])
        found = json.loads(run("inspect", str(path), "--json").stdout)
        left = found["bytes_of_an_unfinished_record"]
        assert found["snapshots"] == (2 if cut else 3)
        assert 0 <= left < len(whole)
        assert bool(left) == bool(cut)
        assert ("is being written" in run("inspect", str(path)).stdout) == bool(cut)


def test_a_state_is_told_by_what_it_holds_and_not_by_its_name(tmp_path: Path):
    path = tmp_path / "placement"
    save_state(path, STATE)
    found = json.loads(run("inspect", str(path), "--json").stdout)
    loads_LR = STATE.placement.rank_load_LR(STATE.load_LE, STATE.quotas_LP)
    assert found["imbalance"] == pytest.approx(imbalance_L(loads_LR).mean())
    assert (found["layers"], found["slots"], found["replicas"]) == (3, 6, 6)
    assert found["slots_LP"] == STATE.placement.slots_LP.tolist()


@pytest.mark.parametrize("name", ["none.eptrace", "none.npz"])
def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path, name: str):
    done = run("inspect", str(tmp_path / name))
    assert done.exit_code == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_long_trace_is_not_kept_in_memory(tmp_path: Path):
    head = head_of(layers=58, experts=256, ranks=8)
    writer = TraceWriter(tmp_path, "load", head)
    writer.write(contiguous(head))
    (snapshot,) = snapshots(head, 1)
    for _ in range(600):
        writer.write(snapshot)
    writer.close()
    tracemalloc.start()
    done = run("inspect", str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.exit_code == 0
    assert writer.files()[0].stat().st_size > 64 << 20
    assert peak < 32 << 20
