"""Writes traces. Each record takes one write, so a file whose writer died lacks only its last record. So does
one on a disk that is full: what was written in part is the end of its file.

Every file begins with the placement, so that older files can be deleted.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import IO

import msgspec

from ep_rebalance.load.trace.head import encode_head
from ep_rebalance.load.trace.layout import Layout, encode_record
from ep_rebalance.load.trace.records import FORMAT_VERSION, Record, RecordedPlacement, TraceHead

SUFFIX = ".eptrace"


class TraceWriter:
    """Writes files `NAME-NUMBER.eptrace` in `folder`, the next one when one is full.

    max_file_bytes: bytes. Size of a full file.
    max_bytes: bytes. Bound on all files of this name, also those of former writers; the oldest are deleted.

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
        self._folder, self._name = folder, name
        self._head = head = msgspec.structs.replace(head, version=FORMAT_VERSION)
        self._layout = Layout.of(head)
        self._max_file_bytes, self._max_bytes = max_file_bytes, max_bytes
        self._size = 0
        self._file: IO[bytes] | None = None
        self._placement: RecordedPlacement | None = None

    def files(self) -> list[Path]:
        """All files of this name, oldest first."""
        found = self._folder.glob(f"{self._name}-*{SUFFIX}")
        return sorted(path for path in found if path.stem.rpartition("-")[2].isdecimal())

    def write(self, record: Record) -> None:
        """Append a record; the first one of all must be a placement."""
        if isinstance(record, RecordedPlacement):
            self._placement = record
            if self._file is not None:
                self._append(encode_record(record, self._layout))
            return
        size = self._layout.snapshot.itemsize
        if self._file is None or self._size + size > self._max_file_bytes:
            self._next_file()
        self._append(encode_record(record, self._layout))

    def close(self) -> None:
        """Finish the file. A later `write` begins another one."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _next_file(self) -> None:
        """Begin a file. It appears with its head and placement, and replaces no other file."""
        assert self._placement is not None, "a trace begins with a placement"
        self.close()
        data = encode_head(self._head) + encode_record(self._placement, self._layout)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{self._name}.")
        file = os.fdopen(handle, "wb", buffering=0)  # unbuffered: each record is one write
        try:
            _write_all(file, data)
            os.fchmod(handle, 0o644)  # `mkstemp` lets nobody else read it
            self._publish(temporary)
        except BaseException:
            file.close()
            raise
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._file, self._size = file, len(data)
        self._delete_oldest()

    def _publish(self, temporary: str) -> None:
        """Give the file the next free number. `os.link` fails if another writer has just taken it."""
        newest = self.files()[-1:]
        number = int(newest[0].stem.rpartition("-")[2]) + 1 if newest else 1
        while True:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self._folder / f"{self._name}-{number:06d}{SUFFIX}")
                return
            number += 1

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        try:
            _write_all(self._file, data)
        except OSError:
            self._file.close()
            self._file = None
            raise
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


def _write_all(file: IO[bytes], data: bytes) -> None:
    """An unbuffered file takes what there is room for, and only the next write says that there is none."""
    written = 0
    while written < len(data):
        written += file.write(memoryview(data)[written:])
