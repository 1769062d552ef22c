"""Format: what the commands know about a kind of file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ep_rebalance.formats.load import ForeignLoad, FormatError
from ep_rebalance.placement import Placement
from ep_rebalance.regular_files import open_regular

NumberedPlacement = tuple[Placement, tuple[int, ...]]
"""A placement, and the numbers that its layers have in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader is told, in case the file does not say it.

    num_ranks: EP ranks of a placement; None if they were not given.
    first_moe_layer: the model's number of a placement's first layer.
    tokens_per_snapshot: tokens. For load that comes token by token.
    keys: a pattern for the names of the arrays to read.
    """

    num_ranks: int | None = None
    first_moe_layer: int = 0
    tokens_per_snapshot: int = 4096
    keys: str = "*"

    def ranks_of(self, path: Path) -> int:
        """The number of ranks. Raises FormatError if it was not given."""
        if self.num_ranks is None:
            raise FormatError(path, "", "does not say how many ranks there are; give --ep-size")
        return self.num_ranks

    def numbered(self, placement: Placement, moe_layers: Sequence[int] = ()) -> NumberedPlacement:
        """A placement whose layers have these numbers; from `first_moe_layer` on, without a gap, if ()."""
        first = self.first_moe_layer
        return placement, tuple(moe_layers or range(first, first + placement.num_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What a writer is told besides the placement.

    layers: number of the model's layers, dense ones included.
    like: a state file of the model that the placement is for.
    """

    layers: int | None = None
    like: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file. A function is None if such files do not hold that, or it cannot be written.

    name: on the command line.
    summary: what the files are, a clause without a semicolon.
    recognises: whether an existing file or folder may be one.
    read_load: a recording. Raises FormatError for whatever is wrong.
    read_placement: a placement. Raises FormatError for whatever is wrong.
    write_placement: replaces a file atomically by a placement, given the numbers that its layers have in
        the model. Raises ValueError for what does not fit.
    """

    name: str
    summary: str
    recognises: Callable[[Path], bool]
    read_load: Callable[[Path, Reading], ForeignLoad] | None = None
    read_placement: Callable[[Path, Reading], NumberedPlacement] | None = None
    write_placement: Callable[[Path, Placement, Sequence[int], Writing], None] | None = None


def beginning(path: Path, length: int) -> bytes:
    """The first `length` bytes of a file; b"" for a folder."""
    if path.is_dir():
        return b""
    with open_regular(path) as file:
        return file.read(length)


def replace_text(path: Path, text: str) -> None:
    """Write a file, or replace it, atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, 0o644)  # `mkstemp` lets nobody else read it
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
