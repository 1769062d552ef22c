"""A trace that cannot be read."""

from __future__ import annotations

from pathlib import Path


class TraceError(ValueError):
    """A file is not a trace, or is damaged. The text names the file, the place and the reason."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}, byte {offset}: {reason}")
