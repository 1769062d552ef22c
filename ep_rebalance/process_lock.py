"""A lock that one process at a time holds, on files that only one may write."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import socket
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)


class TakenError(OSError):
    """Another holder has the lock.

    by_this_process: whether it is one of this process, such as what is left of an engine that was replaced.
    """

    def __init__(self, holder: str, doing: str) -> None:
        super().__init__(f"{holder} {doing} already")
        self.by_this_process = holder == _this_process()


class ProcessLock:
    """Held until its process has ended, however that ends (`flock`).

    path: of the lock file. doing: what its holder does, after "process 7 on host ", for whoever is refused.

    Raises TakenError if it is held already, OSError if the file cannot be made.
    """

    def __init__(self, path: Path, doing: str) -> None:
        self._path, self._doing = path, doing
        self._handle = -1
        self.renew()
        # A child that is forked would hold it as well, and may outlive this process.
        os.register_at_fork(after_in_child=functools.partial(_release, weakref.ref(self)))

    def renew(self) -> None:
        """Take it again if its file was deleted, which others could lock otherwise. Raises as above."""
        while not self._is_in_place():
            self.release()
            self._handle = self._locked()

    def release(self) -> None:
        """Let others have it."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _is_in_place(self) -> bool:
        if self._handle < 0:
            return False
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._handle), os.lstat(self._path))
        return False

    def _locked(self) -> int:
        handle = self._open()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 256).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise TakenError(holder, self._doing) from None
        except OSError as error:
            logger.warning(
                "ep_rebalance: %s cannot be locked (%s): see to it that no other process %s",
                self._path,
                error.strerror,
                self._doing,
            )
        self._sign()
        return handle

    def _open(self) -> int:
        """Only for reading: a file that is open for writing keeps its disk from being made read-only."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(self._path, flags | os.O_CREAT, 0o644)
        except PermissionError:
            return os.open(self._path, flags)  # of another user's server

    def _sign(self) -> None:
        """Write who holds it. Only whoever is refused reads it, so a disk that is full does no harm."""
        with contextlib.suppress(OSError):
            handle = os.open(self._path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.write(handle, f"{_this_process()}\n".encode())
            finally:
                os.close(handle)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _release(lock: weakref.ref[ProcessLock]) -> None:
    if (held := lock()) is not None:
        held.release()
