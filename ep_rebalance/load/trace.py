"""Trace: recorded load on disk, for replay.

A file is a head (JSON) and records of two kinds, each of a size that the head tells: a snapshot of the
tokens per logical expert, and the placement that is served from there on. Every record carries a
checksum and is appended by one write, so that a file can be read while it grows, and one whose writer
died ends at its last whole record. Every file begins with the placement, so that older ones can be
deleted. Integers and floats are little-endian; nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.placement import Placement, PlacementError

FORMAT = "ep-rebalance-trace"
FORMAT_VERSION = 1
SUFFIX = ".eptrace"

_MAGIC = b"EPTRACE\n"
_SNAPSHOT, _PLACEMENT = 1, 2
_MAX_HEAD_BYTES = 1 << 20
_MAX_RECORD_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_FRAME = [("kind", "<u8"), ("checksum", "<u8")]


class TraceError(ValueError):
    """A file that is no trace, or is damaged; the text names the file, the place and the reason."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}, byte {offset}: {reason}")


_RENAMED_SETTINGS = (("data_plane", "shape", "buffers"),)
"""(section, name once, name now)."""


class TraceHead(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded, where and by what.

    top_k: experts per token. slots, ep_size: of the placements; a trace that was recorded without an
    engine has contiguous ones. node_of_rank: length ep_size. expert_bytes: of one expert of each
    layer, 0 if unknown. hidden_size: of the model, 0 if unknown. started: Unix time. config: the
    plugin's settings. origin: where the load comes from if no engine was recorded.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    ep_size: int
    slots: int
    node_of_rank: list[int]
    expert_bytes: list[int]
    hidden_size: int
    engine: str
    plugin_version: str
    started: float
    config: dict[str, Any]
    origin: str = ""
    format: str = FORMAT
    version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedSnapshot:
    """One snapshot as the server saw it.

    counts_ALE: [A, L, E], as in `LoadSample`; uint32 in the file. step: the engine's number of its
    last step. time: Unix. generation: of the placement that was served. planned, scheduled: whether
    the server learned with it that a plan was made, and that the rounds of a migration were worked out.
    """

    counts_ALE: NDArray[np.uint32] | NDArray[np.int64]
    step: int
    steps: int
    step_seconds: float
    time: float
    generation: int
    planned: bool = False
    scheduled: bool = False

    def sample(self) -> LoadSample:
        """What the load window takes."""
        return LoadSample(
            counts_ALE=self.counts_ALE.astype(np.int64),
            steps=self.steps,
            step_seconds=self.step_seconds,
            generation=self.generation,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedPlacement:
    """What is served from the next snapshot on. quotas_LP: float64 [L, P]. step, time: as above."""

    placement: Placement
    quotas_LP: NDArray[np.float64]
    generation: int
    step: int
    time: float


Record = RecordedSnapshot | RecordedPlacement


@dataclass(frozen=True, slots=True)
class _Layout:
    """The structured types of a trace's records, multiples of 8 bytes long."""

    snapshot: np.dtype[np.void]
    placement: np.dtype[np.void]

    @classmethod
    def of(cls, head: TraceHead) -> _Layout:
        counts = (len(PHASES), head.layers, head.experts)
        slots = (head.layers, head.slots)
        padding = [("padding", "V4")] if head.layers * head.slots % 2 else []
        numbers = [("time", "<f8"), ("step", "<i8"), ("generation", "<i8")]
        steps = [("steps", "<i8"), ("step_seconds", "<f8"), ("flags", "<u8")]
        return cls(
            snapshot=np.dtype([*_FRAME, *numbers, *steps, ("counts", "<u4", counts)]),
            placement=np.dtype(
                [*_FRAME, *numbers, ("quotas", "<f8", slots), ("slots", "<i4", slots), *padding]
            ),
        )

    def of_kind(self, kind: int) -> np.dtype[np.void] | None:
        return {_SNAPSHOT: self.snapshot, _PLACEMENT: self.placement}.get(kind)


class TraceReader:
    """Reads one file, from its beginning to its last whole record.

    left_over: bytes behind the last whole record, once it has been read to the end: a record that was
    being written, or whose writer died.
    Raises TraceError at once for a file that is no trace, and while reading for a damaged one; OSError
    if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_over = 0
        with path.open("rb") as file:
            self.head, self._begin = _read_head(path, file)
        self._layout = _Layout.of(self.head)

    @property
    def whole_records(self) -> int:
        """About how many snapshots the file holds; for progress bars."""
        return max(0, self.path.stat().st_size - self._begin) // self._layout.snapshot.itemsize

    def __iter__(self) -> Iterator[Record]:
        offset, rest = self._begin, b""
        with self.path.open("rb") as file:
            file.seek(offset)
            while block := file.read(max(_BLOCK_BYTES, self._layout.placement.itemsize)):
                data, at = rest + block, 0
                while (record := self._record(data, at, offset)) is not None:
                    yield self._decode(record, offset + at)
                    at += record.dtype.itemsize
                rest, offset = data[at:], offset + at
        self.left_over = len(rest)

    def _record(self, data: bytes, at: int, offset: int) -> np.void | None:
        """The record at `data[at:]`, None if it is not whole."""
        if len(data) - at < 16:
            return None
        kind = int.from_bytes(data[at : at + 8], "little")
        layout = self._layout.of_kind(kind)
        if layout is None:
            raise TraceError(self.path, offset + at, f"a record of the unknown kind {kind}")
        if len(data) - at < layout.itemsize:
            return None
        words = np.frombuffer(data, "<u8", layout.itemsize // 8, at)
        if _checksum(words) != words[1]:
            raise TraceError(self.path, offset + at, "the record's checksum is wrong")
        record: np.void = np.frombuffer(data, layout, 1, at)[0]
        return record

    def _decode(self, record: np.void, offset: int) -> Record:
        numbers: dict[str, Any] = {
            "time": float(record["time"]),
            "step": int(record["step"]),
            "generation": int(record["generation"]),
        }
        if record["kind"] == _SNAPSHOT:
            flags = int(record["flags"])
            return RecordedSnapshot(
                counts_ALE=record["counts"],
                steps=int(record["steps"]),
                step_seconds=float(record["step_seconds"]),
                planned=bool(flags & 1),
                scheduled=bool(flags & 2),
                **numbers,
            )
        try:
            placement = Placement(record["slots"], self.head.experts, self.head.ep_size)
        except PlacementError as error:
            raise TraceError(self.path, offset, str(error)) from None
        return RecordedPlacement(placement=placement, quotas_LP=record["quotas"].copy(), **numbers)


class TraceWriter:
    """Writes files `NAME-NUMBER.eptrace` in `folder`, the next one when one is full, and deletes the
    oldest of this name, its own or a former writer's, to stay below `max_bytes` in all.

    Raises OSError if the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        head: TraceHead,
        *,
        max_file_bytes: int = 256 << 20,
        max_bytes: int = 1 << 30,
    ) -> None:
        self._folder, self._name, self._head = folder, name, head
        self._layout = _Layout.of(head)
        self._max_file_bytes, self._max_bytes = max_file_bytes, max_bytes
        self._size = 0
        self._file: IO[bytes] | None = None
        self._placement: RecordedPlacement | None = None

    def files(self) -> list[Path]:
        """All that are there, oldest first."""
        return sorted(self._folder.glob(f"{self._name}-*{SUFFIX}"))

    def write(self, record: Record) -> None:
        """Append a record; the first one of all must be a placement."""
        if isinstance(record, RecordedPlacement):
            self._placement = record
            if self._file is not None:
                self._append(_encode_placement(record, self._layout.placement))
            return
        size = self._layout.snapshot.itemsize
        if self._file is None or self._size + size > self._max_file_bytes:
            self._next_file()
        self._append(_encode_snapshot(record, self._layout.snapshot))

    def close(self) -> None:
        """The file is whole; a later `write` begins another."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _next_file(self) -> None:
        """Head and placement appear under the file's name at once, and replace nobody's file."""
        assert self._placement is not None, "a trace begins with a placement"
        self.close()
        data = _encode_head(self._head) + _encode_placement(self._placement, self._layout.placement)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{self._name}.")
        file = os.fdopen(handle, "wb", buffering=0)
        try:
            file.write(data)
            os.fchmod(handle, 0o644)
            self._publish(temporary)
        except BaseException:
            file.close()
            raise
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._file, self._size = file, len(data)
        self._delete_oldest()

    def _publish(self, temporary: str) -> None:
        newest = self.files()[-1:]
        number = int(newest[0].stem.rpartition("-")[2]) + 1 if newest else 1
        while True:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self._folder / f"{self._name}-{number:06d}{SUFFIX}")
                return
            number += 1

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._size += len(data)

    def _delete_oldest(self) -> None:
        """Make room for another full file."""
        *older, _ = self.files()
        total = sum(file.stat().st_size for file in older) + self._max_file_bytes
        for file in older:
            if total <= self._max_bytes:
                return
            total -= file.stat().st_size
            file.unlink(missing_ok=True)


def read_records(readers: list[TraceReader]) -> Iterator[Record]:
    """The records of several files of one server, oldest file first.

    Raises ValueError if they do not belong together.
    """
    for reader in readers[1:]:
        check_same_load(readers[0].head, reader.head, str(reader.path))
    for reader in sorted(readers, key=_beginning):
        yield from reader


def check_same_load(first: TraceHead, other: TraceHead, name: str) -> None:
    """Raises ValueError unless one replay can run over both."""
    for field in ("model", "layers", "experts", "top_k"):
        one, another = getattr(first, field), getattr(other, field)
        if one != another:
            raise ValueError(
                f"{name} was recorded with {field}={another}, the others with {field}={one}; "
                "replay them apart"
            )


def _beginning(reader: TraceReader) -> tuple[float, str]:
    return next((record.time for record in reader), 0.0), reader.path.name


def _checksum(words: NDArray[np.uint64]) -> np.uint64:
    """Of a record: of its 64-bit words without the checksum's own."""
    return _weighted_sum(words, _record_factors(len(words)))


def _weighted_sum(words: NDArray[np.uint64], factors: NDArray[np.uint64]) -> np.uint64:
    """Wrapping. Odd factors, so that any change of one word shows, and rising ones, so that two changes
    make up for each other by rare chance only.
    """
    return np.uint64(np.dot(words, factors))


@functools.cache
def _factors(length: int) -> NDArray[np.uint64]:
    return 2 * np.arange(length, dtype=np.uint64) + np.uint64(1)


@functools.cache
def _record_factors(length: int) -> NDArray[np.uint64]:
    """0 for the word that holds the checksum."""
    factors = _factors(length).copy()
    factors[1] = 0
    return factors


def _encode(kind: int, layout: np.dtype[np.void], values: Mapping[str, Any]) -> bytes:
    record = np.zeros(1, layout)
    record["kind"] = kind
    for name, value in values.items():
        record[name] = value
    record["checksum"] = _checksum(record.view("<u8"))
    return record.tobytes()


def _encode_snapshot(snapshot: RecordedSnapshot, layout: np.dtype[np.void]) -> bytes:
    values = {
        "time": snapshot.time,
        "step": snapshot.step,
        "generation": snapshot.generation,
        "steps": snapshot.steps,
        "step_seconds": snapshot.step_seconds,
        "flags": int(snapshot.planned) | int(snapshot.scheduled) << 1,
        "counts": snapshot.counts_ALE,
    }
    return _encode(_SNAPSHOT, layout, values)


def _encode_placement(change: RecordedPlacement, layout: np.dtype[np.void]) -> bytes:
    values = {
        "time": change.time,
        "step": change.step,
        "generation": change.generation,
        "quotas": change.quotas_LP,
        "slots": change.placement.slots_LP,
    }
    return _encode(_PLACEMENT, layout, values)


def _encode_head(head: TraceHead) -> bytes:
    text = msgspec.json.encode(head)
    text += b" " * (-len(text) % 8)
    words = np.frombuffer(text, "<u8")
    sizes = np.array([len(text), _weighted_sum(words, _factors(len(words)))], "<u8")
    return _MAGIC + sizes.tobytes() + text


def _read_head(path: Path, file: IO[bytes]) -> tuple[TraceHead, int]:
    """The head and the offset of the first record."""
    start = file.read(24)
    if len(start) < 24 or not start.startswith(_MAGIC):
        raise TraceError(
            path, 0, "this is no trace of ep_rebalance; `ep-rebalance convert` makes one"
        )
    length, checksum = (int(word) for word in np.frombuffer(start, "<u8", 2, 8))
    if length > _MAX_HEAD_BYTES or length % 8:
        raise TraceError(path, 8, f"a head of {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise TraceError(path, 24, "the head is cut off")
    if _weighted_sum(np.frombuffer(text, "<u8"), _factors(length // 8)) != checksum:
        raise TraceError(path, 24, "the head's checksum is wrong")
    try:
        head = msgspec.json.decode(text, type=TraceHead)
    except msgspec.MsgspecError as error:
        raise TraceError(path, 24, f"the head does not say what a head must ({error})") from None
    head = msgspec.structs.replace(head, config=_with_present_names(head.config))
    if reason := _fault(head):
        raise TraceError(path, 24, reason)
    return head, 24 + length


def _with_present_names(config: dict[str, Any]) -> dict[str, Any]:
    """Settings as an earlier release recorded them, under the names that they have now."""
    parts = {name: dict(part) for name, part in config.items() if isinstance(part, dict)}
    for section, old, new in _RENAMED_SETTINGS:
        if old in parts.get(section, {}):
            parts[section][new] = parts[section].pop(old)
    return config | parts


def _fault(head: TraceHead) -> str:
    """Why a head cannot be right, or ""."""
    if head.format != FORMAT or head.version != FORMAT_VERSION:
        return (
            f"format {head.format!r} version {head.version}; this ep-rebalance reads {FORMAT!r} "
            f"version {FORMAT_VERSION}, so use the one that wrote it ({head.plugin_version})"
        )
    sizes = (head.layers, head.experts, head.top_k, head.ep_size, head.slots)
    if min(sizes) < 1 or head.slots % head.ep_size or head.slots < head.experts:
        return (
            f"{head.layers} layers, {head.experts} experts, top {head.top_k}, {head.slots} slots on "
            f"{head.ep_size} ranks cannot be"
        )
    largest = head.layers * max(4 * len(PHASES) * head.experts, 12 * head.slots)
    if largest > _MAX_RECORD_BYTES:
        return f"records of {largest} bytes, more than {_MAX_RECORD_BYTES}"
    if len(head.node_of_rank) != head.ep_size or len(head.expert_bytes) != head.layers:
        return "its lists of ranks and layers are not as long as it says"
    return ""
