from __future__ import annotations

import errno
import itertools
import math
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from disks import room_for
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mutations import MUTATIONS, mutated
from traces import contiguous, head_of, records_of, same, snapshots, write_trace

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.snapshot import Agreed
from ep_rebalance.load.trace import (
    SUFFIX,
    MigrationEnd,
    RecordedSnapshot,
    TraceError,
    TraceReader,
    TraceWriter,
    check_same_load,
    read_records,
)
from ep_rebalance.load.trace.checksums import checksum_of_head
from ep_rebalance.load.trace.head import encode_head
from ep_rebalance.load.trace.layout import Layout, encode_record


@given(
    counts=arrays(np.uint32, (2, 3, 5), elements=st.integers(0, 2**32 - 1)),
    numbers=st.tuples(st.integers(0, 2**53), st.integers(0, 2**31), st.integers(0, 2**53)),
    seconds=st.floats(0, 1e6),
    agreed=st.builds(
        Agreed,
        planned=st.booleans(),
        proposed=st.booleans(),
        scheduled=st.booleans(),
        unscheduled_ranks=st.integers(0, 2),
        fitted=st.booleans(),
        paused=st.booleans(),
        plan_asked=st.booleans(),
        replaced=st.booleans(),
        reloaded=st.sets(st.integers(0, 2)).map(sorted).map(tuple),
    ),
    ended=st.none() | st.builds(MigrationEnd, st.integers(0, 2**31), st.booleans()),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, counts, numbers, seconds, agreed, ended
) -> None:
    head = head_of(layers=3, experts=5, ranks=5, redundant=0)
    snapshot = RecordedSnapshot(
        counts_ALE=counts,
        step=numbers[0],
        steps=numbers[1],
        generation=numbers[2],
        step_seconds=seconds,
        time=2.0 * seconds,
        agreed=agreed,
        ended=ended,
    )
    writer = TraceWriter(tmp_path_factory.mktemp("trace"), "load", head)
    written = [contiguous(head), snapshot, contiguous(head, generation=7, step=3), snapshot]
    for record in written:
        writer.write(record)
    writer.close()
    (path,) = writer.files()
    assert TraceReader(path).head == head
    assert all(same(*pair) for pair in zip(records_of(path), written, strict=True))


def test_a_file_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    head = head_of()
    writer = TraceWriter(tmp_path, "load", head)
    writer.write(contiguous(head))
    for number, snapshot in enumerate(snapshots(head, 5)):
        writer.write(snapshot)
        (path,) = writer.files()
        assert len(records_of(path)) == number + 2
    writer.close()


def test_a_writer_that_died_leaves_all_whole_records(tmp_path: Path) -> None:
    path = write_trace(tmp_path, head_of(), 3)
    whole, data = records_of(path), path.read_bytes()
    record = Layout.of(head_of()).snapshot.itemsize
    for lost in range(1, 2 * record):
        path.write_bytes(data[:-lost])
        reader = TraceReader(path)
        kept = list(reader)
        assert len(kept) == len(whole) - 1 - (lost > record)
        assert all(same(*pair) for pair in zip(kept, whole, strict=False))
        assert reader.left_over == (-lost) % record


def test_a_full_file_is_followed_by_another_and_the_oldest_goes(tmp_path: Path) -> None:
    head = head_of()
    record = Layout.of(head).snapshot.itemsize
    writer = TraceWriter(tmp_path, "load", head, max_file_bytes=40 * record, max_bytes=130 * record)
    writer.write(contiguous(head))
    seen = list(snapshots(head, 200))
    for snapshot in seen:
        writer.write(snapshot)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 130 * record
    writer.close()
    readers = [TraceReader(path) for path in writer.files()]
    kept = [r for r in read_records(readers[::-1]) if isinstance(r, RecordedSnapshot)]
    assert 50 < len(kept) < 130
    assert all(same(*pair) for pair in zip(kept, seen[-len(kept) :], strict=True))
    assert all(same(next(iter(reader)), contiguous(head)) for reader in readers)


@pytest.mark.parametrize("quota", [math.nan, math.inf, -0.5, 0.0, 0.75, 1e308])
def test_a_share_that_cannot_be_is_refused(tmp_path: Path, quota: float) -> None:
    head = head_of()
    served = contiguous(head)
    quotas_LP = served.quotas_LP.copy()
    quotas_LP[0, 0] = quota
    path = tmp_path / f"made-up{SUFFIX}"
    record = encode_record(replace(served, quotas_LP=quotas_LP), Layout.of(head))
    path.write_bytes(encode_head(head) + record)
    with pytest.raises(TraceError, match=r"byte \d+: layer 0: .*get.* of its (expert's )?tokens"):
        list(TraceReader(path))


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_step_time_that_cannot_be_is_refused(tmp_path: Path, seconds: float) -> None:
    head = head_of()
    [snapshot] = snapshots(head, 1)
    with pytest.raises(ValueError, match="a step cannot take"):
        replace(snapshot, step_seconds=seconds)
    object.__setattr__(snapshot, "step_seconds", seconds)  # as another writer might
    path = tmp_path / f"made-up{SUFFIX}"
    layout = Layout.of(head)
    path.write_bytes(encode_head(head) + encode_record(snapshot, layout))
    with pytest.raises(TraceError, match=r"byte \d+: a step cannot take"):
        list(TraceReader(path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"time": math.nan}, "it cannot be of time nan"),
        ({"time": -1.0}, "it cannot be of time -1.0"),
        ({"time": 1e18}, "it cannot be of time 1e\\+18"),
        ({"step": -1}, "step -1 of generation 0"),
        ({"generation": -1}, "of generation -1 cannot be"),
        ({"steps": -1}, "-1 steps cannot be"),
        ({"steps": 1 << 62}, "a snapshot of 4611686018427387904 steps"),
        ({"step": (1 << 63) - 1}, "of generation 0 cannot be"),
        ({"generation": 1 << 62}, "of generation 4611686018427387904 cannot be"),
        ({"step_seconds": 1e308}, "a step cannot take 1e\\+308 seconds"),
        ({"agreed": Agreed(unscheduled_ranks=-1)}, "-1 ranks without rounds"),
        ({"agreed": Agreed(reloaded=(2,))}, "layers beyond the 2 cannot be reloaded"),
        ({"ended": MigrationEnd(batches=-2, abandoned=False)}, "-2 batches cannot be"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, changes, reason: str) -> None:
    head = head_of()
    [snapshot] = snapshots(head, 1)
    for name, value in changes.items():
        object.__setattr__(snapshot, name, value)  # as another writer might
    path = tmp_path / f"made-up{SUFFIX}"
    path.write_bytes(encode_head(head) + encode_record(snapshot, Layout.of(head)))
    with pytest.raises(TraceError, match=rf"byte \d+: .*{reason}"):
        list(TraceReader(path))


def test_a_writer_replaces_no_file_of_another(tmp_path: Path) -> None:
    first = write_trace(tmp_path, head_of(), 2)
    before = first.read_bytes()
    second = write_trace(tmp_path, head_of(), 3)
    assert first != second
    assert first.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.suffix != SUFFIX]


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / f"load-before the upgrade{SUFFIX}"
    kept.write_bytes(b"x" * 10_000)
    head = head_of()
    writer = TraceWriter(tmp_path, "load", head, max_file_bytes=3_000, max_bytes=9_000)
    for record in (contiguous(head), *snapshots(head, 40)):
        writer.write(record)
    writer.close()
    assert kept.exists()
    assert len(writer.files()) > 1


def test_a_new_file_begins_with_the_placement_of_its_time(tmp_path: Path) -> None:
    head = head_of()
    writer = TraceWriter(tmp_path, "load", head)
    for record in (contiguous(head), *snapshots(head, 1), contiguous(head, 4, 9)):
        writer.write(record)
    writer.close()
    for snapshot in snapshots(head, 1):
        writer.write(snapshot)
    writer.close()
    assert same(records_of(writer.files()[1])[0], contiguous(head, 4, 9))


def test_behind_a_record_that_found_no_room_nothing_is_written(tmp_path: Path) -> None:
    head = head_of()
    writer = TraceWriter(tmp_path, "load", head)
    seen = list(snapshots(head, 6))
    for record in (contiguous(head), *seen[:2]):
        writer.write(record)
    (first,) = writer.files()
    with (
        room_for(first, Layout.of(head).snapshot.itemsize // 2),
        pytest.raises(OSError, match="too large"),
    ):
        writer.write(seen[2])
    for record in (contiguous(head, 1), *seen[3:]):
        writer.write(record)
    writer.close()
    kept = [records_of(path) for path in writer.files()]
    assert [len(records) for records in kept] == [3, 4]
    assert all(same(*pair) for pair in zip(kept[1][1:], seen[3:], strict=True))


def test_what_a_disk_took_of_a_record_is_cut_off(tmp_path: Path) -> None:
    head = head_of()
    writer = TraceWriter(tmp_path, "load", head)
    seen = list(snapshots(head, 3))
    for record in (contiguous(head), *seen[:2]):
        writer.write(record)
    (path,) = writer.files()
    whole = path.read_bytes()
    with room_for(path, 20), pytest.raises(OSError, match="too large"):
        writer.write(seen[2])
    assert path.read_bytes() == whole


def test_a_disk_that_fails_at_the_end_of_a_file_does_not_get_more_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of()
    writer = TraceWriter(tmp_path, "load", head)
    seen = list(snapshots(head, 2))
    for record in (contiguous(head), seen[0]):
        writer.write(record)

    def fails(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output"):
            writer.close()
    writer.write(seen[1])
    writer.close()
    assert [len(records_of(path)) for path in writer.files()] == [2, 2]


DAY = 86_400.0


def recorded_at(folder: Path, times: list[float]) -> list[TraceReader]:
    """A file for each time, whose one snapshot has the number of its file as its step."""
    head = head_of()
    writer = TraceWriter(folder, "load", head)
    [snapshot] = snapshots(head, 1)
    for number, time in enumerate(times, 1):
        writer.write(replace(contiguous(head), time=time))
        writer.write(replace(snapshot, time=time, step=number))
        writer.close()
    return [TraceReader(path) for path in writer.files()]


def steps_of(readers: list[TraceReader]) -> list[int]:
    return [r.step for r in read_records(readers) if isinstance(r, RecordedSnapshot)]


def test_a_clock_that_is_set_back_between_files_does_not_change_their_order(
    tmp_path: Path,
) -> None:
    readers = recorded_at(tmp_path, [10 * DAY, 9 * DAY, 9.5 * DAY, 1 * DAY])
    for order in itertools.permutations(readers):
        assert steps_of(list(order)) == [1, 2, 3, 4]


def test_numbers_of_more_digits_come_later(tmp_path: Path) -> None:
    readers = recorded_at(tmp_path, [3 * DAY, 2 * DAY])
    (tmp_path / "load-000001.eptrace").rename(tmp_path / "load-999999.eptrace")
    (tmp_path / "load-000002.eptrace").rename(tmp_path / "load-1000000.eptrace")
    writer = TraceWriter(tmp_path, "load", head_of())
    readers = [TraceReader(path) for path in writer.files()]
    assert steps_of(readers[::-1]) == [1, 2]
    for record in (contiguous(head_of()), *snapshots(head_of(), 1)):
        writer.write(record)
    writer.close()
    assert [path.name for path in writer.files()][-1] == "load-1000001.eptrace"


def test_folders_go_by_their_time_and_files_without_a_number_too(tmp_path: Path) -> None:
    late, early, alone = (tmp_path / name for name in ("a", "b", "c"))
    for folder in (late, early, alone):
        folder.mkdir()
    readers = recorded_at(late, [5 * DAY, 4 * DAY]) + recorded_at(early, [2 * DAY, 3 * DAY])
    [converted] = recorded_at(alone, [1 * DAY])
    converted.path.rename(alone / "converted.eptrace")
    readers.append(TraceReader(alone / "converted.eptrace"))
    assert [r.time / DAY for r in read_records(readers) if r.step] == [1, 2, 3, 5, 4]


def test_a_file_whose_beginning_found_no_room_does_not_appear(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"")
    writer = TraceWriter(tmp_path, "load", head_of())
    writer.write(contiguous(head_of()))
    with room_for(path, 100), pytest.raises(OSError, match="too large"):
        writer.write(*snapshots(head_of(), 1))
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIX}"
    for content in (b"", b"{}", b"PK\x03\x04" * 100, b"EPTRACE\n" + b"\xff" * 16):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=path.name):
            TraceReader(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 3}, "version 3"),
        ({"format": "other"}, "format 'other'"),
        ({"layers": 0}, "cannot be"),
        ({"slots": 9}, "cannot be"),
        ({"slots": 9, "experts": 7}, "cannot be"),
        ({"slots": 6}, "cannot be"),
        ({"layers": 4096, "experts": 10**6, "slots": 10**6}, "records of"),
        ({"layers": 4097, "expert_bytes": [1] * 4097}, "cannot be"),
        ({"ep_size": 10**4, "node_of_rank": [0] * 10**4}, "on 10000 ranks cannot be"),
        ({"top_k": 9}, "top 9, 8 slots on 2 ranks cannot be"),
        ({"node_of_rank": [-1, 0]}, "nodes must have numbers from 0, below the 2 ranks"),
        ({"node_of_rank": [0, 2**40]}, "nodes must have numbers"),
        ({"expert_bytes": [1, -1]}, "an expert of such a size"),
        ({"expert_bytes": [1, 10**40]}, "an expert of such a size"),
        ({"hidden_size": -1}, "an expert of such a size"),
        ({"moe_layers": [3, 3]}, "must rise"),
        ({"moe_layers": [-5, 3]}, "must rise"),
        ({"moe_layers": [3, 10**30]}, "below 4096"),
        ({"started": 1e300}, "started at 1e\\+300"),
        ({"bytes_per_second": [5e-324, 1.0, 1.0]}, "links of"),
        ({"bytes_per_second": [1.0, 1.0, 1.0], "round_seconds": 1e308}, "links of"),
        ({"node_of_rank": [0]}, "lists"),
        ({"expert_bytes": [1] * 3}, "lists"),
    ],
)
def test_impossible_heads_are_refused(tmp_path: Path, changes, reason) -> None:
    path = tmp_path / f"x{SUFFIX}"
    path.write_bytes(encode_head(msgspec.structs.replace(head_of(), **changes)))
    with pytest.raises(TraceError, match=reason):
        TraceReader(path)


def test_a_head_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """With the right checksum, as of a writer that is not ours."""
    text = msgspec.json.encode(head_of(model="tiny")).replace(b"tiny", b"t\xe5ny")
    text += b" " * (-len(text) % 8)
    sizes = np.array([len(text), checksum_of_head(text)], "<u8")
    path = tmp_path / f"x{SUFFIX}"
    path.write_bytes(b"EPTRACE\n" + sizes.tobytes() + text)
    with pytest.raises(TraceError, match="does not say what a head must"):
        TraceReader(path)


def test_traces_of_other_models_are_not_mixed() -> None:
    check_same_load(head_of(), head_of(ranks=4, redundant=4), "b")
    with pytest.raises(ValueError, match=r"b was recorded with experts=16"):
        check_same_load(head_of(), head_of(experts=16), "b")


def test_damaged_files_are_refused_or_end_early(tmp_path: Path) -> None:
    """Whatever changes, nothing is read that was not written, and nothing else is raised."""
    path = write_trace(tmp_path, head_of(), 4)
    whole, data = records_of(path), path.read_bytes()
    head, draw = TraceReader(path).head, random.Random(0)
    refused = 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, draw))
        try:
            reader = TraceReader(path)
            assert reader.head == head
            kept = list(reader)
        except TraceError as error:
            refused += path.name in str(error)
            continue
        assert len(kept) < len(whole)
        assert all(same(*pair) for pair in zip(kept, whole, strict=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 0.7 * MUTATIONS
    assert peak < 32 << 20


def test_snapshots_are_samples_of_the_window() -> None:
    (snapshot,) = snapshots(head_of(), 1)
    sample = replace(snapshot, step_seconds=0.5).sample()
    assert (sample.steps, sample.step_seconds) == (16, 0.5)
    assert sample.counts_ALE.dtype == np.int64
    assert (sample.counts_ALE == snapshot.counts_ALE).all()


def test_settings_that_an_earlier_release_recorded_have_the_names_of_now(tmp_path: Path):
    recorded = {"mode": "observe", "data_plane": {"shape": "fixed", "capacity_factor": 2.0}}
    head = TraceReader(write_trace(tmp_path, head_of(config=recorded), 1)).head
    assert head.config["data_plane"] == {"buffers": "fixed", "capacity_factor": 2.0}
    assert load_config(head.config).data_plane.buffers == "fixed"
