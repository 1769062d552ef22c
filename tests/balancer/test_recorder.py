from __future__ import annotations

import queue
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from traces import contiguous, head_of, records_of, snapshots

from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.config import TraceConfig
from ep_rebalance.load.snapshot import NOTHING_AGREED, Agreed, Snapshot
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceHead
from ep_rebalance.migration.served import Served

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


def test_a_disk_that_refuses_costs_records_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    recorder = recorder_in(folder)
    shutil.rmtree(folder)
    feed(recorder, 3)
    assert recorder.lost == 1
    assert not recorder.recording
    assert "no longer written" in caplog.text
    folder.mkdir()
    recorder.switch(True)
    feed(recorder, 2)
    assert len(records_of(files(folder)[0])) == 3


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
