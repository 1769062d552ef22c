"""State saver: writes the state file, in a thread of its own, since a disk may be slow or hang.

At most one save is under way and one waits for it: the newest. What the disk refuses is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ep_rebalance.config import ConfigurationError
from ep_rebalance.load.state import (
    FORMAT,
    FORMAT_VERSION,
    Header,
    ModelIdentity,
    SavedState,
    save_state,
    state_lock,
    sweep_unfinished,
)
from ep_rebalance.load.window import LoadSample, window_load
from ep_rebalance.migration.served import Served
from ep_rebalance.process_lock import ProcessLock, TakenError
from ep_rebalance.telemetry.file_health import Stopwatch
from ep_rebalance.version import __version__

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""Between two attempts on a disk that refuses."""


@dataclass(frozen=True, slots=True)
class _Due:
    served: Served
    samples: Sequence[LoadSample]


class StateSaver:
    """Rank 0's.

    saved: Unix time of the last save; 0 before the first.

    Raises ConfigurationError if another process saves to the same file.
    """

    def __init__(self, path: Path, identity: ModelIdentity) -> None:
        self.saved = 0.0
        self._path, self._identity = path, identity
        self._newest: deque[_Due] = deque(maxlen=1)
        self._wake = threading.Event()
        self._refusal = ""
        self._attempt = Stopwatch()
        self._lock: ProcessLock | None = None
        self._hold_at_start()
        sweep_unfinished(path)
        self._thread = threading.Thread(target=self._run, name="ep_rebalance state", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> str:
        """Why the newest placement is not saved; "" if it is or soon will be."""
        if not self._thread.is_alive():
            return "the thread that saves the state has ended; restart the server"
        return self._attempt.overdue("the state") or self._refusal

    def save(self, served: Served, samples: Sequence[LoadSample]) -> None:
        """Save this soon, in place of what still waits. Never waits itself."""
        self._newest.append(_Due(served, samples))
        self._wake.set()

    def _run(self) -> None:
        due: _Due | None = None
        while True:
            self._wake.wait(RETRY_SECONDS if due is not None else None)
            self._wake.clear()
            if self._newest:
                due = self._newest.pop()
            if due is not None and self._carry_out(due):
                due = None

    def _carry_out(self, due: _Due) -> bool:
        """Returns whether the state is saved."""
        try:
            with self._attempt:
                self._hold()
                save_state(self._path, self._state(due))
        except BaseException as error:  # a thread that ends would save nothing any more
            self._note_refusal(error)
            return False
        if self._refusal:
            logger.warning("ep_rebalance: the state is saved again, in %s", self._path)
        self.saved, self._refusal = time.time(), ""
        return True

    def _hold_at_start(self) -> None:
        try:
            self._hold()
        except TakenError as error:
            raise ConfigurationError(
                f"{error}, and each would overwrite what the other one saved.",
                "name a file of its own in state.path for each server, or end the other one.",
            ) from None
        except OSError:
            pass  # a disk that refuses is told when there is something to save

    def _hold(self) -> None:
        """Hold the lock of the state file. Raises OSError if that is not possible."""
        try:
            if self._lock is None:
                self._lock = state_lock(self._path)
            self._lock.renew()
        except TakenError as error:
            if not error.by_this_process:  # an engine that this one replaces saves nothing any more
                raise

    def _note_refusal(self, error: BaseException) -> None:
        before, self._refusal = self._refusal, str(error) or type(error).__name__
        if not before:
            logger.warning(
                "ep_rebalance: the state was not saved in %s: %s; that is tried again every %g s",
                self._path,
                self._refusal,
                RETRY_SECONDS,
            )

    def _state(self, due: _Due) -> SavedState:
        header = Header(
            format=FORMAT,
            version=FORMAT_VERSION,
            identity=self._identity,
            generation=due.served.generation,
            saved_at=time.time(),
            plugin_version=__version__,
        )
        return SavedState(
            header=header,
            placement=due.served.placement,
            quotas_LP=due.served.quotas_LP,
            load_LE=window_load(due.samples).load_LE,
        )
