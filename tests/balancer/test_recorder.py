from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from disks import room_for, run, running, until
from traces import contiguous, head_of, records_of, snapshots

from ep_rebalance.balancer import recorder as recorder_module
from ep_rebalance.balancer.recorder import NOT_ANSWERED, Recorder
from ep_rebalance.config import ConfigurationError, TraceConfig
from ep_rebalance.load.snapshot import NOTHING_AGREED, Agreed, Snapshot
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceHead, TraceReader
from ep_rebalance.migration.served import Served
from ep_rebalance.pipeline import PipelineStage
from ep_rebalance.telemetry import file_health

HEAD = head_of()
SERVED = Served.initial(contiguous(HEAD).placement)


def recorder_in(folder: Path, head: TraceHead = HEAD, **settings: object) -> Recorder:
    return Recorder(TraceConfig(path=str(folder), **settings), head)


def feed(
    recorder: Recorder, count: int, served: Served = SERVED, agreed: Agreed = NOTHING_AGREED
) -> None:
    for recorded in snapshots(HEAD, count):
        snapshot = Snapshot(sample=recorded.sample(), agreed=agreed)
        recorder.snapshot(snapshot, served, recorded.step, None)
        recorder.flush()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.eptrace"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "RETRY_SECONDS", 0.1)


def test_snapshots_and_the_placements_they_were_served_with_are_recorded(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    feed(recorder, 3)
    slots_LP = SERVED.placement.slots_LP[:, ::-1]
    moved = replace(SERVED, placement=replace(SERVED.placement, slots_LP=slots_LP), generation=1)
    feed(recorder, 2, moved, Agreed(planned=True))
    records = records_of(files(tmp_path)[0])
    kinds = [type(record) for record in records]
    first, second = (
        [RecordedPlacement, *[RecordedSnapshot] * 3],
        [RecordedPlacement, *[RecordedSnapshot] * 2],
    )
    assert kinds == [*first, *second]
    assert [record.generation for record in records] == [0] * 4 + [1] * 3
    assert [record.agreed.planned for record in records[5:]] == [True, True]
    assert records[4].placement == moved.placement
    for read, fed in zip(records[1:4], snapshots(HEAD, 3), strict=True):
        assert np.array_equal(read.counts_ALE, fed.counts_ALE)
        assert (read.step, read.steps, read.step_seconds) == (fed.step, 16, 0.05)


def test_recording_can_be_switched(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path, record=False)
    feed(recorder, 2)
    assert files(tmp_path) == []
    recorder.switch(True)
    feed(recorder, 1)
    recorder.switch(False)
    feed(recorder, 5)
    recorder.switch(True)
    feed(recorder, 3)
    assert [len(records_of(path)) for path in files(tmp_path)] == [2, 4]
    assert recorder.lost == 0


def whole_files(folder: Path) -> list[int]:
    """How many records each file has; none has anything but whole ones."""
    counts = []
    for path in files(folder):
        reader = TraceReader(path)
        counts.append(len(list(reader)))
        assert reader.left_over == 0
    return counts


def test_a_disk_that_refuses_costs_records_until_it_takes_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = recorder_in(tmp_path)
    feed(recorder, 3)
    (first,) = files(tmp_path)
    with room_for(first, 20):
        feed(recorder, 3)
        assert recorder.lost == 3
        assert "File too large" in recorder.fault
        assert [len(records_of(path)) for path in files(tmp_path)] == [4]
    recorder.switch(True)  # has the disk tried now
    until(lambda: not recorder.fault)
    feed(recorder, 2)
    assert whole_files(tmp_path) == [4, 3]
    assert recorder.lost == 3
    told = [r.getMessage() for r in caplog.records if "the trace is" in r.getMessage()]
    assert len(told) == 2  # one line for the refusals, and one for their end


def test_a_disk_that_is_full_when_the_next_file_is_begun_costs_records_until_it_is_not(
    impatient: None,
) -> None:
    """On a real one of 1 MiB, which something else fills."""
    program = """
import subprocess, sys
from pathlib import Path
from disks import fill, until
from ep_rebalance.balancer import recorder as module
from test_recorder import HEAD, feed, files, recorder_in, whole_files
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
module.RETRY_SECONDS = 0.05
recorder = recorder_in(folder)
feed(recorder, 2)
recorder.switch(False)
recorder.flush()
fill(folder / "filling")
recorder.switch(True)
until(lambda: "No space left" in recorder.fault)
feed(recorder, 2)
assert recorder.lost == 3, recorder.lost
(folder / "filling").unlink()
until(lambda: not recorder.fault)
feed(recorder, 2)
assert whole_files(folder) == [3, 3], whole_files(folder)
assert sorted(p.name for p in folder.iterdir()) == [".load.lock", *(p.name for p in files(folder))]
print("done")
"""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with tempfile.TemporaryDirectory() as folder:
        done = run(program, folder, inside=("unshare", "--mount", "--propagation", "private"))
    assert done.stdout == "done\n", done.stderr


def test_a_folder_that_is_gone_costs_records_until_it_is_back(
    tmp_path: Path, impatient: None
) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    recorder = recorder_in(folder)
    feed(recorder, 1)
    shutil.rmtree(folder)
    feed(recorder, 3)
    assert recorder.lost == 4  # with the one that was deleted
    assert "No such file" in recorder.fault
    folder.mkdir()
    until(lambda: not recorder.fault)  # though no snapshot comes
    feed(recorder, 2)
    assert whole_files(folder) == [3]


@pytest.mark.parametrize(
    ("spoil", "lost", "kept"),
    [
        pytest.param(Path.unlink, 2, [4], id="deleted"),
        pytest.param(lambda path: os.truncate(path, 0), 2, [4], id="cut off"),
        pytest.param(
            lambda path: path.rename(path.with_name("moved.eptrace")), 0, [4, 3], id="moved"
        ),
    ],
)
def test_a_file_that_others_spoil_while_it_is_written_is_noticed_and_followed_by_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil, lost, kept
) -> None:
    recorder = recorder_in(tmp_path)
    feed(recorder, 2)
    (first,) = files(tmp_path)
    spoil(first)
    feed(recorder, 3)
    assert recorder.lost == lost
    assert [n for n in whole_counts(tmp_path) if n] == kept
    assert "while it was written" in caplog.text
    assert not recorder.fault


def whole_counts(folder: Path) -> list[int]:
    return [len(records_of(p)) for p in files(folder) if p.stat().st_size]


@pytest.mark.parametrize("name", ["load-old", "load-1", "load-00000001", "load-1e9", "load-²²²²²²"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_what_is_not_of_the_recorder_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str
) -> None:
    other = tmp_path / f"{name}.eptrace"
    make_entry(other, kind)
    before = other.lstat()
    recorder = recorder_in(tmp_path, max_file_bytes=1 << 20, max_bytes=2 << 20)
    feed(recorder, 3)
    recorder.switch(False)
    recorder.flush()
    assert recorder.lost == 0
    assert other.lstat() == before
    assert whole_files_but(tmp_path, other) == [4]
    assert other.name in caplog.text


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_something_else_of_our_name_is_in_nobodys_way(tmp_path: Path, kind: str) -> None:
    other = tmp_path / "load-000001.eptrace"
    make_entry(other, kind)
    recorder = recorder_in(tmp_path)
    feed(recorder, 1)
    assert recorder.lost == 0
    assert whole_files_but(tmp_path, other) == [2]


def make_entry(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_bytes(b"x" * (3 << 20))  # more than all files together may take
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("elsewhere")
        case "fifo":
            os.mkfifo(path)


def whole_files_but(folder: Path, other: Path) -> list[int]:
    return [len(records_of(path)) for path in files(folder) if path != other]


HOLDER = """
import sys, time
from test_recorder import recorder_in
from pathlib import Path
recorder = recorder_in(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_second_recorder_is_refused_until_the_first_ones_process_is_killed(
    tmp_path: Path,
) -> None:
    with running(HOLDER, tmp_path) as process:
        for _ in range(2):
            with pytest.raises(ConfigurationError) as refused:
                recorder_in(tmp_path)
            assert f"process {process.pid} on " in refused.value.reason
            assert str(tmp_path) in refused.value.reason
            assert "trace.path" in refused.value.remedy
        process.kill()
        process.wait()
        feed(recorder_in(tmp_path), 2)
    assert whole_files(tmp_path) == [3]


def test_a_child_of_the_recorders_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    # The child says "ready", so that what it does after a fork is done.
    program = HOLDER.replace("print(", "import os\nos.fork() and time.sleep(600)\nprint(")
    with running(program, tmp_path) as process:
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        try:
            assert child.is_running()
            feed(recorder_in(tmp_path), 1)
        finally:
            child.kill()


def test_stages_of_a_pipeline_have_a_folder_and_a_recorder_each(tmp_path: Path) -> None:
    config = TraceConfig(path=str(tmp_path))
    for stage in PipelineStage.every(2):
        folder = Path(stage.folder(str(config.path)))
        folder.mkdir()
        feed(recorder_in(folder), 1)
        assert whole_files(folder) == [2]


def test_a_lock_that_was_deleted_is_taken_again_with_the_next_file(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    feed(recorder, 1)
    for entry in tmp_path.iterdir():
        entry.unlink()
    feed(recorder, 1)
    with pytest.raises(ConfigurationError, match="already"):
        recorder_in(tmp_path)


def test_of_two_recorders_of_a_folder_that_was_made_anew_one_writes(
    tmp_path: Path, impatient: None
) -> None:
    first = recorder_in(tmp_path)
    feed(first, 1)
    for entry in tmp_path.iterdir():
        entry.unlink()
    second = recorder_in(tmp_path)
    feed(second, 2)
    feed(first, 2)
    assert "already" in first.fault
    assert whole_files(tmp_path) == [3]


@pytest.mark.parametrize("place", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_refused_at_start(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written") as refused:
        recorder_in(tmp_path / place)
    assert "create it" in refused.value.remedy


def test_what_a_killed_recorder_left_unfinished_is_swept_at_start(tmp_path: Path) -> None:
    left = tmp_path / ".load.a1b2c3d4"
    left.write_bytes(b"EPTRACE\n and no more")
    left.chmod(0o600)
    kept = tmp_path / ".load.a1b2c3d5"
    kept.write_bytes(b"somebody's notes")
    kept.chmod(0o600)
    recorder_in(tmp_path)
    assert (left.exists(), kept.exists()) == (False, True)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), MemoryError()])
def test_whatever_is_raised_costs_a_record_and_not_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    recorder = recorder_in(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(recorder._writer, "write", _raiser(error))
        feed(recorder, 1)
    assert recorder.lost > 0
    assert recorder.fault == (str(error) or type(error).__name__)
    recorder.switch(True)
    until(lambda: not recorder.fault)
    feed(recorder, 2)
    assert whole_files(tmp_path) == [3]


def _raiser(error: BaseException) -> object:
    def raise_it(record: object) -> None:
        raise error

    return raise_it


def test_a_thread_that_has_ended_or_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ended").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "_run", lambda self: None)
        ended = recorder_in(tmp_path / "ended")
    ended._thread.join()
    assert "has ended" in ended.fault
    assert "has ended" in ended.answer
    hangs = threading.Event()
    recorder = recorder_in(tmp_path)
    monkeypatch.setattr(file_health, "OVERDUE_SECONDS", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(recorder._writer, "write", lambda record: hangs.wait())
        (recorded,) = snapshots(HEAD, 1)
        snapshot = Snapshot(sample=recorded.sample(), agreed=NOTHING_AGREED)
        recorder.snapshot(snapshot, SERVED, 1, None)
        until(lambda: "the disk has not taken" in recorder.fault)
        hangs.set()
        until(lambda: not recorder.fault)


def test_who_switches_recording_on_is_told_what_the_disk_says(
    tmp_path: Path, impatient: None
) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    recorder = recorder_in(folder, record=False)
    assert recorder.answer == ""
    shutil.rmtree(folder)
    recorder.switch(True)
    recorder.flush()
    assert "No such file" in recorder.answer
    recorder.switch(False)
    assert recorder.answer == ""
    folder.mkdir()
    recorder.switch(True)
    recorder.flush()
    assert recorder.answer == ""
    recorder._checking = True  # as until the thread has tried
    assert recorder.answer == NOT_ANSWERED


def test_a_slow_disk_costs_records_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = recorder_in(tmp_path)
    recorder._waiting.maxsize = 4
    with recorder._waiting.all_tasks_done:  # as long as this is held, the thread gets nothing
        monkeypatch.setattr(recorder._waiting, "put_nowait", _full)
        (recorded,) = snapshots(HEAD, 1)
        snapshot = Snapshot(sample=recorded.sample(), agreed=NOTHING_AGREED)
        recorder.snapshot(snapshot, SERVED, 1, None)
    monkeypatch.undo()
    assert recorder.lost == 1
    feed(recorder, 2)
    assert isinstance(records_of(files(tmp_path)[0])[0], RecordedPlacement)


def _full(record: object) -> None:
    raise queue.Full
