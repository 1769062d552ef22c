"""Writes traces. Each record takes one write, so a file whose writer died lacks only its last record. A write
that the disk refuses is the end of its file, which is cut back to the last whole record.

Every file begins with the placement, so that older files can be deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import IO

import msgspec

from ep_rebalance.load.trace.head import MAGIC, encode_head
from ep_rebalance.load.trace.layout import Layout, encode_record
from ep_rebalance.load.trace.records import FORMAT_VERSION, Record, RecordedPlacement, TraceHead
from ep_rebalance.load.trace_names import SUFFIX, file_name, number_of
from ep_rebalance.load.unfinished import sweep, unfinished
from ep_rebalance.process_lock import ProcessLock

logger = logging.getLogger(__name__)


class TraceWriter:
    """Writes files `NAME-NUMBER.eptrace` in `folder`, the next one when one is full.

    max_file_bytes: bytes. Size of a full file.
    max_bytes: bytes. Bound on all files of this name, also those of former writers; the oldest are deleted.
    lock: on the folder; None for one that nobody else knows.

    The attribute `lost` counts snapshots in files that others deleted or changed while they were written.

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
        lock: ProcessLock | None = None,
    ) -> None:
        self.lost = 0
        self._folder, self._name = folder, name
        self._head = head = msgspec.structs.replace(head, version=FORMAT_VERSION)
        self._layout = Layout.of(head)
        self._max_file_bytes, self._max_bytes = max_file_bytes, max_bytes
        self._lock = lock
        self._size = self._snapshots = 0
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self._placement: RecordedPlacement | None = None
        if lock is not None:  # no other writer is at work here
            sweep(folder, name, MAGIC)
            self._warn_of_others()

    def files(self) -> list[Path]:
        """All files of this name, in the order of their numbers. Others are not ours: they are left alone."""
        numbered = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                number = number_of(Path(entry.name), self._name)
                if number is not None and entry.is_file(follow_symlinks=False):
                    numbered.append((number, self._folder / entry.name))
        return [path for _, path in sorted(numbered)]

    def note_placement(self, placement: RecordedPlacement) -> None:
        """Begin the next file with this placement, without writing it now."""
        self._placement = placement

    def write(self, record: Record) -> None:
        """Append a record; the first one of all must be a placement."""
        self._leave_spoilt_file()
        if isinstance(record, RecordedPlacement):
            self.note_placement(record)
            if self._file is not None:
                self._append(encode_record(record, self._layout))
            return
        size = self._layout.snapshot.itemsize
        if self._file is None or self._size + size > self._max_file_bytes:
            self._next_file()
        self._append(encode_record(record, self._layout))
        self._snapshots += 1

    def close(self) -> None:
        """Finish the file, whatever the disk says to that. A later `write` begins another one."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                os.fsync(file.fileno())

    def check_writable(self) -> None:
        """Raises OSError if the disk would not take another file now."""
        if self._lock is not None:
            self._lock.renew()
        with unfinished(self._folder, self._name, buffering=0) as (file, _), file:
            # As much as the beginning of a file and a snapshot, so that what follows finds room, too.
            records = self._layout.placement.itemsize + self._layout.snapshot.itemsize
            _write_all(file, encode_head(self._head) + bytes(records))
            os.fsync(file.fileno())

    def _warn_of_others(self) -> None:
        ours = {path.name for path in self.files()}
        found = sorted(self._folder.glob(f"{self._name}-*{SUFFIX}"))
        others = [path.name for path in found if path.name not in ours]
        if others:
            logger.warning(
                "ep_rebalance: %s holds %s, not files of %s-NUMBER%s that were recorded here; they are left "
                "alone and do not count",
                self._folder,
                ", ".join(others[:8]),
                self._name,
                SUFFIX,
            )

    def _leave_spoilt_file(self) -> None:
        """Close a file that was deleted, moved or changed by others. Records behind that would be in vain."""
        if self._file is None:
            return
        assert self._path is not None
        found, named = os.fstat(self._file.fileno()), None
        with contextlib.suppress(FileNotFoundError):
            named = os.lstat(self._path)
        if named is not None and os.path.samestat(found, named) and found.st_size == self._size:
            return
        whole = found.st_size == self._size
        what = ("moved" if found.st_nlink else "deleted") if whole else "changed"
        self.lost += 0 if what == "moved" else self._snapshots
        logger.warning(
            "ep_rebalance: %s was %s after %d snapshots, while it was written; a new file is begun",
            self._path,
            what,
            self._snapshots,
        )
        self._file.close()
        self._file = None

    def _next_file(self) -> None:
        """Begin a file. It appears with its head and placement, and replaces no other file."""
        assert self._placement is not None, "a trace begins with a placement"
        self.close()
        if self._lock is not None:
            self._lock.renew()
        self._delete_oldest()
        data = encode_head(self._head) + encode_record(self._placement, self._layout)
        with unfinished(self._folder, self._name, buffering=0) as (file, temporary):
            _write_all(file, data)  # unbuffered: each record is one write
            self._path = self._publish(temporary)
            os.fchmod(file.fileno(), 0o644)  # so far nobody else could read it
        self._file, self._size, self._snapshots = file, len(data), 0

    def _publish(self, temporary: Path) -> Path:
        """Give the file the next free number. `os.link` fails if another writer has just taken it."""
        newest = [number_of(path, self._name) for path in self.files()[-1:]]
        number = (newest[0] or 0) + 1 if newest else 1
        while True:
            with contextlib.suppress(FileExistsError):
                path = self._folder / file_name(self._name, number)
                os.link(temporary, path)
                return path
            number += 1

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        try:
            _write_all(self._file, data)
        except BaseException:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), self._size)
            with contextlib.suppress(OSError):
                file.close()
            raise
        self._size += len(data)

    def _delete_oldest(self) -> None:
        """Make room for another full file."""
        sizes = {}
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):  # somebody else deleted it
                sizes[path] = path.stat().st_size
        total = sum(sizes.values()) + self._max_file_bytes
        for path, size in sizes.items():
            if total <= self._max_bytes:
                return
            total -= size
            path.unlink(missing_ok=True)


def _write_all(file: IO[bytes], data: bytes) -> None:
    """An unbuffered file takes what there is room for, and only the next write says that there is none."""
    written = 0
    while written < len(data):
        written += file.write(memoryview(data)[written:])
