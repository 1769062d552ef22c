"""The folder of a trace: one recorder at a time writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import socket
import weakref
from pathlib import Path

from ep_rebalance.config import ConfigurationError
from ep_rebalance.regular_files import kind_of

logger = logging.getLogger(__name__)


class FolderTakenError(OSError):
    """Another recorder writes to the folder."""


def check_folder(path: str) -> None:
    """Raises ConfigurationError if traces could not be written to the folder `path`."""
    try:
        kind = kind_of(Path(path))
        fault = f"is {kind}" if kind != "a folder" else "is not writable for the server"
        if kind == "a folder" and os.access(path, os.W_OK | os.X_OK):
            return
    except OSError as error:
        fault, kind = f"cannot be looked at ({error.strerror})", "?"
    raise ConfigurationError(
        f"trace.path={path!r} {fault if kind else 'does not exist'}, and must be a folder that the "
        "server may write to.",
        "create it, name another one, or drop trace.path.",
    )


class FolderLock:
    """Held by the recorder of the files `name` until its process has ended, however that ends (`flock`).

    Raises FolderTakenError if another recorder holds it, OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f".{name}.lock"
        self._handle = -1
        self.renew()
        # A child that is forked would hold it as well, and may outlive this process.
        os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(self)))

    def renew(self) -> None:
        """Take it again if its file was deleted, which others could lock otherwise. Raises as above."""
        while not self._is_in_place():
            self.release()
            self._handle = self._locked()

    def release(self) -> None:
        """Let others have the folder."""
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
            raise FolderTakenError(
                f"{holder} records to {str(self._path.parent)!r} already"
            ) from None
        except OSError as error:
            logger.warning(
                "ep_rebalance: %s cannot be locked (%s): see to it that nothing else records to its folder",
                self._path,
                error.strerror,
            )
        with contextlib.suppress(OSError):  # only for the error above; a full disk may refuse it
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return handle

    def _open(self) -> int:
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | flags, 0o644)
        except PermissionError:
            return os.open(self._path, os.O_RDONLY | flags)  # of another user's server


def _close(lock: weakref.ref[FolderLock]) -> None:
    if (held := lock()) is not None:
        held.release()
