"""This plugin's traces (load/trace/), read for the placement that was served last."""

from __future__ import annotations

from pathlib import Path

from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import NumberedPlacement, Reading
from ep_rebalance.load.trace import SUFFIX, RecordedPlacement, TraceReader


def recognises(path: Path) -> bool:
    """Recognises a file by its name."""
    return path.suffix == SUFFIX


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """The last placement.

    Raises FormatError for a file without one.
    """
    reader = TraceReader(path)
    changes = [record for record in reader if isinstance(record, RecordedPlacement)]
    if not changes:
        raise FormatError(
            path, "", "holds no placement: its writer died at once; take another file"
        )
    return reading.numbered(path, changes[-1].placement, reader.head.moe_layers)
