"""A trace that cannot be read."""

from __future__ import annotations

from pathlib import Path

COPY_AGAIN = "copy the file again, or leave it out"
"""The remedy for what was right when it was written."""


class TraceError(ValueError):
    """A file is not a trace, or is damaged. The text names the file, the place and the reason."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}, byte {offset}: {reason}")
