"""Files of other engines: recordings become traces, and placements are read and written.

Each format is a module here with a `FORMAT`, and an entry of `FORMATS`. Nothing in a file is executed: no
pickles, `yaml.safe_load`, `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from ep_rebalance.formats import (
    arrays,
    csv_counts,
    sglang,
    state,
    tensorrt_llm,
    trace,
    vllm_answers,
    vllm_ascend,
)
from ep_rebalance.formats.contents import FormatError, unread_kind
from ep_rebalance.formats.format import Format, NumberedPlacement, Reading
from ep_rebalance.formats.load import ForeignLoad

_Reader = TypeVar("_Reader")

_ENTRIES = (
    vllm_ascend.FORMAT,
    vllm_answers.FORMAT,
    sglang.FORMAT,
    tensorrt_llm.FORMAT,
    arrays.FORMAT,
    csv_counts.FORMAT,
    state.FORMAT,
    trace.FORMAT,
)

FORMATS: Mapping[str, Format] = MappingProxyType({one.name: one for one in _ENTRIES})
"""By name, in the order in which a file is tried: SGLang's format takes any JSON that is left."""


_OTHER = {
    True: "holds a placement, no load; give a TARGET that is no trace, with --to",
    False: "holds load, no placement; make a trace of it, and of that a placement by `ep-rebalance plan`",
}
"""What to say of a file, by whether load was asked for."""


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """A recording, in the first format that recognises the file. Raises FormatError."""
    readers = [(one, one.read_load) for one in FORMATS.values() if one.read_load]
    return _reader_of(path, readers)(path, reading)


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """A placement, in the first format that recognises the file. Raises FormatError."""
    readers = [(one, one.read_placement) for one in FORMATS.values() if one.read_placement]
    return _reader_of(path, readers)(path, reading)


def _reader_of(path: Path, readers: Sequence[tuple[Format, _Reader]]) -> _Reader:
    path.stat()  # a missing file is an OSError, not one of an unknown format
    for one, read in readers:
        if one.recognises(path):
            return read
    if kind := unread_kind(path):
        raise FormatError(path, "", kind)
    if any(one.recognises(path) for one in FORMATS.values()):
        raise FormatError(path, "", _OTHER[readers[0][1] == readers[0][0].read_load])
    names = ", ".join(one.name for one, _ in readers)
    raise FormatError(path, "", f"is of none of the kinds {names}; write it as one of these")
