"""What the commands know of a file format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ep_rebalance.formats.load import ForeignLoad, FormatError
from ep_rebalance.placement import Placement

NumberedPlacement = tuple[Placement, tuple[int, ...]]
"""A placement and the model's numbers of its layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read besides the file, where the file does not tell.

    num_ranks, first_moe_layer: of a placement. tokens_per_snapshot: of load that comes token by token.
    keys: a pattern for the names of the arrays to take.
    """

    num_ranks: int | None = None
    first_moe_layer: int = 0
    tokens_per_snapshot: int = 4096
    keys: str = "*"

    def ranks_of(self, path: Path) -> int:
        """Raises FormatError if they were not given."""
        if self.num_ranks is None:
            raise FormatError(path, "", "does not tell the ranks; give --ep-size")
        return self.num_ranks

    def numbered(self, placement: Placement) -> NumberedPlacement:
        """Layers from `first_moe_layer` on, without a gap."""
        first = self.first_moe_layer
        return placement, tuple(range(first, first + placement.num_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What is written besides the placement. layers: of the model, dense ones included. like: a state
    file whose model the placement is for."""

    layers: int | None = None
    like: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file. What it does not hold, or what cannot be read or written, is None.

    name: on the command line. summary: what the files are, a clause without a semicolon.
    recognises: whether a file or folder may be one; it is asked of those that exist.
    read_load, read_placement: raise FormatError for whatever is wrong.
    write_placement: replaces the file at once; takes the model's numbers of the placement's layers;
        raises ValueError for what does not fit.
    """

    name: str
    summary: str
    recognises: Callable[[Path], bool]
    read_load: Callable[[Path, Reading], ForeignLoad] | None = None
    read_placement: Callable[[Path, Reading], NumberedPlacement] | None = None
    write_placement: Callable[[Path, Placement, Sequence[int], Writing], None] | None = None


def beginning(path: Path, length: int) -> bytes:
    """The first bytes of a file, none of a folder."""
    if path.is_dir():
        return b""
    with path.open("rb") as file:
        return file.read(length)


def replace_text(path: Path, text: str) -> None:
    """At once or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
