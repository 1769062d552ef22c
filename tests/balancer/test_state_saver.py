"""State saver: the newest placement is on disk sooner or later, and nobody waits for it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from disks import run, running, until
from saved_states import IDENTITY, STATE, saved_generation

from ep_rebalance.balancer import state_saver
from ep_rebalance.balancer.state_saver import StateSaver
from ep_rebalance.config import ConfigurationError
from ep_rebalance.load.state import load_state, save_state
from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.served import Served
from ep_rebalance.telemetry import file_health

SERVED = Served(placement=STATE.placement, quotas_LP=STATE.quotas_LP, generation=7)
SAMPLES = [LoadSample(counts_ALE=np.ones((2, 3, 4), np.int64), steps=4, step_seconds=0.1)]


def generation(number: int) -> Served:
    return replace(SERVED, generation=number)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_saver, "RETRY_SECONDS", 0.05)


def test_what_is_saved_is_read(tmp_path: Path):
    path = tmp_path / "state.npz"
    saver = StateSaver(path, IDENTITY)
    assert (saver.fault, saver.saved) == ("", 0.0)
    saver.save(SERVED, SAMPLES)
    until(lambda: saver.saved)
    state = load_state(path, IDENTITY)
    assert state is not None
    assert state.placement == SERVED.placement
    assert (state.load_LE == 2.0).all()
    assert saver.fault == ""


def test_what_the_disk_refuses_is_told_once_and_saved_when_it_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, impatient: None
):
    path = tmp_path / "folder" / "state.npz"
    saver = StateSaver(path, IDENTITY)
    for number in (1, 2, 3):
        saver.save(generation(number), SAMPLES)
        until(lambda: "No such file" in saver.fault)
    path.parent.mkdir()
    until(lambda: not saver.fault)
    assert saved_generation(path) == 3
    assert len([r for r in caplog.records if "was not saved" in r.getMessage()]) == 1


SMALL_DISK = """
import sys, subprocess
from pathlib import Path
from disks import fill, until
from ep_rebalance.balancer import state_saver
from test_state_saver import *
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
state_saver.RETRY_SECONDS = 0.05
path = folder / "state.npz"
save_state(path, STATE)
fill(folder / "filling")
saver = StateSaver(path, IDENTITY)
saver.save(generation(8), SAMPLES)
until(lambda: "No space left" in saver.fault)
assert saved_generation(path) == 7
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
until(lambda: "Read-only" in saver.fault)
(folder / "x").exists()
subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
(folder / "filling").unlink()
until(lambda: not saver.fault)
assert saved_generation(path) == 8
names = sorted(p.name for p in folder.iterdir())
assert names == [".state.npz.lock", "state.npz"], names
print("done")
"""


def test_a_real_disk_that_is_full_then_read_only_then_neither(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = run(SMALL_DISK, tmp_path, inside=("unshare", "--mount", "--propagation", "private"))
    assert done.stdout == "done\n", done.stderr


def test_while_the_disk_hangs_nobody_waits_and_then_the_newest_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, goes_on, begun = tmp_path / "state.npz", threading.Event(), []

    def hangs(where: Path, state: object) -> None:
        begun.append(state.header.generation)
        assert goes_on.wait(60)
        save_state(where, state)

    monkeypatch.setattr(state_saver, "save_state", hangs)
    monkeypatch.setattr(file_health, "OVERDUE_SECONDS", 0.05)
    saver = StateSaver(path, IDENTITY)
    for number in range(1, 101):
        saver.save(generation(number), SAMPLES)
        until(lambda: begun)
    until(lambda: "the disk has not taken the state for" in saver.fault)
    assert len(saver._newest) == 1
    goes_on.set()
    until(lambda: saved_generation(path) == 100)
    assert begun == [1, 100]
    until(lambda: not saver.fault)


def test_whatever_is_raised_is_told_and_ends_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
):
    path = tmp_path / "state.npz"

    def ends(where: Path, state: object) -> None:
        raise SystemExit

    saver = StateSaver(path, IDENTITY)
    with monkeypatch.context() as patched:
        patched.setattr(state_saver, "save_state", ends)
        saver.save(SERVED, SAMPLES)
        until(lambda: saver.fault == "SystemExit")
    until(lambda: not saver.fault)
    assert saved_generation(path) == 7


def test_a_thread_that_has_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(StateSaver, "_run", lambda self: None)
        saver = StateSaver(tmp_path / "state.npz", IDENTITY)
    saver._thread.join()
    assert "has ended" in saver.fault


def test_what_a_killed_server_left_is_swept_at_start(tmp_path: Path):
    left = tmp_path / ".state.npz.abcd_123"
    left.write_bytes(b"PK")
    left.chmod(0o600)
    StateSaver(tmp_path / "state.npz", IDENTITY)
    assert not left.exists()


SAVES = """
import sys, time
from pathlib import Path
from test_state_saver import *
saver = StateSaver(Path(sys.argv[1]), IDENTITY)
saver.save(SERVED, SAMPLES)
until(lambda: saver.saved)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_second_server_with_the_same_file_is_refused(tmp_path: Path):
    path = tmp_path / "state.npz"
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    with running(SAVES, path) as first:
        with pytest.raises(ConfigurationError) as refused:
            StateSaver(link, IDENTITY)
        for text in (f"process {first.pid} on ", str(link), "state.path"):
            assert text in str(refused.value)
    StateSaver(path, IDENTITY)


def test_what_another_server_saves_to_meanwhile_is_left_to_it(tmp_path: Path, impatient: None):
    """The folder was away when the server started, and another server was quicker when it came back."""
    path = tmp_path / "folder" / "state.npz"
    saver = StateSaver(path, IDENTITY)
    path.parent.mkdir()
    with running(SAVES, path) as other:
        saver.save(generation(8), SAMPLES)
        until(lambda: f"process {other.pid} on " in saver.fault)
        assert saved_generation(path) == SERVED.generation
    until(lambda: not saver.fault)
    assert saved_generation(path) == 8


def test_an_engine_that_replaces_another_one_in_its_process_saves(tmp_path: Path):
    path = tmp_path / "state.npz"
    for number in (7, 8):
        saver = StateSaver(path, IDENTITY)
        saver.save(generation(number), SAMPLES)
        until(lambda saver=saver: saver.saved)
        assert saved_generation(path) == number
