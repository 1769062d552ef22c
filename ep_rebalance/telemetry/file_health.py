"""Whether the files can be written that a server keeps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

OVERDUE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHealth:
    """How the files of one rank fare.

    faults: for `trace` and `state`, those that are configured: why it cannot be written; "" if it can.
    lost_trace_records: since the start.
    state_saved: Unix time. When the state file was last written; 0 before the first time.
    """

    faults: Mapping[str, str] = field(default_factory=dict)
    lost_trace_records: int = 0
    state_saved: float = 0.0


class Stopwatch:
    """A context whose duration another thread watches: a disk that hangs raises nothing."""

    def __init__(self) -> None:
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._began = None

    def overdue(self, what: str) -> str:
        """A text once the disk has been busy with `what` for OVERDUE_SECONDS, else ""."""
        began = self._began  # once, since the other thread changes it
        seconds = 0.0 if began is None else time.monotonic() - began
        if seconds < OVERDUE_SECONDS:
            return ""
        return f"the disk has not taken {what} for {seconds:.0f} s"
