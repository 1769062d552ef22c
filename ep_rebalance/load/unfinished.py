"""Unfinished files: what is to appear whole or not at all is written beside its place first.

The writer holds a lock on such a file (`flock`), which ends with its process however that ends. So one that
nobody holds is left over from a writer that was killed, also if that ran in another container or on another
host that shares the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def unfinished(folder: Path, name: str, *, buffering: int = -1) -> Iterator[tuple[IO[bytes], Path]]:
    """(an open file, its path) to be filled, and then given its name by a link or a rename.

    The path is gone afterwards. The file is closed if an error is raised; else its user closes it.

    Raises OSError if the folder cannot be written.
    """
    handle, temporary = _create(folder, name)
    path = Path(temporary)
    try:
        file = os.fdopen(handle, "wb", buffering=buffering)
        try:
            yield file, path
        except BaseException:
            with contextlib.suppress(OSError):  # what a full disk refused is in its buffer
                file.close()
            raise
    finally:
        path.unlink(missing_ok=True)


def sweep(folder: Path, name: str, begins: bytes) -> None:
    """Delete what killed writers of `name` have left in a folder, as far as that is possible.

    begins: what each of their files begins with. One with other contents is not theirs.
    """
    ours = re.compile(re.escape(f".{name}.") + "[a-z0-9_]{8}")  # as `mkstemp` names them
    try:
        found = [entry for entry in os.scandir(folder) if ours.fullmatch(entry.name)]
    except OSError as error:
        logger.warning("ep_rebalance: %s was not looked at for unfinished files: %s", folder, error)
        return
    for entry in found:
        try:
            if entry.is_file(follow_symlinks=False) and _delete_left_over(entry.path, begins):
                logger.info("ep_rebalance: deleted %s, which a killed process left", entry.path)
        except OSError as error:
            logger.warning("ep_rebalance: %s was left as it is: %s", entry.path, error)


def _create(folder: Path, name: str) -> tuple[int, str]:
    while True:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            swept = True
        except OSError:
            swept = False  # the file system knows no locks; nor will `sweep` get one there
        else:
            swept = os.fstat(handle).st_nlink == 0
        if not swept:
            return handle, temporary
        os.close(handle)  # another process took it for a leftover before the lock was there


def _delete_left_over(path: str, begins: bytes) -> bool:
    """Delete a file of ours whose writer is gone. Returns whether it was one."""
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        private = stat.S_IMODE(found.st_mode) & 0o077 == 0  # as `mkstemp` makes them
        if not private or found.st_uid != os.geteuid():
            return False
        if not begins.startswith(os.read(handle, len(begins))):
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)  # before the lock is given back, so that `_create` sees it
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
