"""The folder of a trace: one recorder at a time writes to it."""

from __future__ import annotations

import os
from pathlib import Path

from ep_rebalance.config import ConfigurationError
from ep_rebalance.process_lock import ProcessLock
from ep_rebalance.regular_files import kind_of


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


def folder_lock(folder: Path, name: str) -> ProcessLock:
    """The lock of the recorder of the files `name`. Raises as `ProcessLock` does."""
    return ProcessLock(folder / f".{name}.lock", f"records to {str(folder)!r}")
