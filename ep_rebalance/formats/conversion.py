"""Reads a file in the first of FORMATS that recognises it, and writes one in the format that is named."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_rebalance.formats import FORMATS, Format
from ep_rebalance.formats.contents import FormatError, unread_kind
from ep_rebalance.formats.format import NumberedPlacement, Reading, Writing
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.placement import Placement

_NO_LOAD = "holds a placement, no load; give a TARGET that is no trace, with --to"
_NO_PLACEMENT = (
    "holds load, no placement; make a trace of it, and of that a placement by `ep-rebalance plan`"
)


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """A recording, in the first format that recognises the file. Raises FormatError."""
    readers = [one for one in FORMATS.values() if one.reads_load]
    load: ForeignLoad = _reader_of(path, readers, _NO_LOAD).read_load(path, reading)
    return load


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """A placement, in the first format that recognises the file. Raises FormatError."""
    readers = [one for one in FORMATS.values() if one.reads_placement]
    found: NumberedPlacement = _reader_of(path, readers, _NO_PLACEMENT).read_placement(
        path, reading
    )
    return found


def write_placement(
    path: Path, placement: Placement, moe_layers: Sequence[int], to: str, writing: Writing
) -> None:
    """Replace a file atomically by a placement. Raises ValueError for what does not fit.

    moe_layers: the numbers that the placement's layers have in the model.
    to: the name of a format that writes placements.
    """
    _module(FORMATS[to]).write_placement(path, placement, moe_layers, writing)


def _reader_of(path: Path, readers: Sequence[Format], other: str) -> Any:
    """The module of the first reader that recognises the file.

    other: what to say of a file that only other formats recognise.
    """
    path.stat()  # a missing file is an OSError, not one of an unknown format
    for one in readers:
        if _module(one).recognises(path):
            return _module(one)
    if kind := unread_kind(path):
        raise FormatError(path, "", kind)
    if any(_module(one).recognises(path) for one in FORMATS.values()):
        raise FormatError(path, "", other)
    names = ", ".join(one.name for one in readers)
    raise FormatError(path, "", f"is of none of the kinds {names}; write it as one of these")


def _module(one: Format) -> Any:
    return import_module(one.module)
