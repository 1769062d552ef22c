"""Reads traces, also while they are being written."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np

from ep_rebalance.load.trace.checksums import checksum_of_record
from ep_rebalance.load.trace.error import COPY_AGAIN, TraceError
from ep_rebalance.load.trace.head import read_head
from ep_rebalance.load.trace.layout import Layout, decode_record
from ep_rebalance.load.trace.records import Record, TraceHead
from ep_rebalance.load.trace_names import place_in_sequence
from ep_rebalance.regular_files import open_regular

_BLOCK_BYTES = 4 << 20


class TraceReader:
    """Reads one file, from its beginning to its last whole record.

    left_over: bytes after the last whole record, set once the file has been read to the end. They belong
        to a record that is being written, or whose writer died.

    Raises TraceError immediately for a file that is not a trace, and while reading a damaged one; OSError
    if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_over = 0
        with open_regular(path) as file:
            self.head, self._begin = read_head(path, file)
        self._layout = Layout.of(self.head)

    @property
    def whole_records(self) -> int:
        """About how many snapshots the file holds, for progress bars: the few placements count too."""
        return max(0, self.path.stat().st_size - self._begin) // self._layout.snapshot.itemsize

    def __iter__(self) -> Iterator[Record]:
        offset, rest = self._begin, b""
        with open_regular(self.path) as file:
            file.seek(offset)
            while block := file.read(max(_BLOCK_BYTES, self._layout.placement.itemsize)):
                data, at = rest + block, 0  # a record may begin in one block and end in the next
                while (record := self._record(data, at, offset)) is not None:
                    yield self._decode(record, offset + at)
                    at += record.dtype.itemsize
                rest, offset = data[at:], offset + at
        self.left_over = len(rest)

    def _record(self, data: bytes, at: int, offset: int) -> np.void | None:
        """The record at `data[at:]`; None if it is not whole.

        offset: of `data` in the file, for errors.
        """
        if len(data) - at < 16:
            return None
        kind = int.from_bytes(data[at : at + 8], "little")
        layout = self._layout.of_kind(kind)
        if layout is None:
            raise TraceError(
                self.path, offset + at, f"a record of the unknown kind {kind}; {COPY_AGAIN}"
            )
        if len(data) - at < layout.itemsize:
            return None
        checksum = int.from_bytes(data[at + 8 : at + 16], "little")
        whole = data[at : at + layout.itemsize]
        if checksum_of_record(whole, self.head.version) != checksum:
            raise TraceError(
                self.path, offset + at, f"the record's checksum is wrong; {COPY_AGAIN}"
            )
        record: np.void = np.frombuffer(whole, layout)[0]
        return record

    def _decode(self, record: np.void, offset: int) -> Record:
        try:
            return decode_record(record, self.head)
        except ValueError as error:
            raise TraceError(self.path, offset, str(error)) from None


def read_records(readers: list[TraceReader]) -> Iterator[Record]:
    """The records of several files of one server, oldest file first.

    Files of one folder go by their numbers, since a clock may be set back. Folders may have the same
    numbers, and go by the time of their first record.

    Raises ValueError if the files do not belong together.
    """
    for reader in readers[1:]:
        check_same_load(readers[0].head, reader.head, str(reader.path))
    sequences: dict[tuple[Path, str], list[tuple[int, TraceReader]]] = {}
    for reader in readers:
        sequence, number = place_in_sequence(reader.path)
        sequences.setdefault(sequence, []).append((number, reader))
    parts = [
        [reader for _, reader in sorted(part, key=itemgetter(0))] for part in sequences.values()
    ]
    for part in sorted(parts, key=lambda part: _beginning(part[0])):
        for reader in part:
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
