"""Regular files: read without waiting, and nothing else is.

A path that somebody names may be a FIFO, whose `open` waits for a writer, or a device, which may never end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

REGULAR = "a regular file"

_PART_BYTES = 1 << 20

_KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: Path) -> str:
    """What a path or the target of a link is: REGULAR, "a FIFO" and so on; "" if there is nothing.

    Raises OSError if that cannot be seen.
    """
    try:
        return _kind(os.stat(path))
    except FileNotFoundError:
        return ""
    except ValueError as error:  # such as a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open for reading. Raises OSError for everything else, without waiting."""
    # Looked at before, since opening a device may do something, and again, since it may be another now.
    _refuse_others(path, kind_of(path) or REGULAR)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_others(path, _kind(os.fstat(handle)))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """What a regular file holds. Raises OSError for everything else, and for a larger file."""
    parts: list[bytes] = []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size  # 0 for those in /proc
        room = max_bytes - size
        while room >= 0 and (part := file.read(min(size, _PART_BYTES) or 4096)):
            parts.append(part)
            room = max_bytes - sum(map(len, parts))
    if room < 0:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes} bytes", str(path))
    return b"".join(parts)


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "no file")


def _refuse_others(path: Path, kind: str) -> None:
    if kind != REGULAR:
        raise OSError(errno.EINVAL, f"it is {kind}, and must be {REGULAR}", str(path))
