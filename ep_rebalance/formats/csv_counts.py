"""Counts as CSV: a line for each layer and expert, with the numbers of both and the tokens.

A first line names the columns, `layer`, `expert` and `count` in any order; `snapshot` may be a fourth.
Without it they are the three in this order. What has no line has no tokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from ep_rebalance.formats.contents import FormatError, read_text, suffix_of
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.layer_counts import layers_with_experts
from ep_rebalance.formats.load import MAX_COUNTS, ForeignLoad
from ep_rebalance.placement import MAX_LAYERS

_COLUMNS = ("layer", "expert", "count")
_SNAPSHOT = "snapshot"
_NAMES = {"tokens": "count", "experts": "expert", "layers": "layer", "step": _SNAPSHOT}
"""Other words for columns."""
_MAX_EXPERTS = 1 << 16
_FEW, _MOST_GAPS = 1 << 22, 100
"""Counts that may be whatever the lines, and how many for each line if there are more."""
_MOST = {"layer": MAX_LAYERS - 1, "expert": _MAX_EXPERTS - 1, _SNAPSHOT: 2**53, "count": 2**53}


def recognises(path: Path) -> bool:
    """Recognises a file by its name."""
    return suffix_of(path) in (".csv", ".tsv")


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """The counts. Layers keep their numbers. Raises FormatError."""
    cells: dict[tuple[int, int, int], int] = {}
    for line, row in _rows(path):
        cell = row.get(_SNAPSHOT, 0), row["layer"], row["expert"]
        if cell in cells:
            where = f"layer {row['layer']}, expert {row['expert']}"
            raise FormatError(path, f"line {line}", f"has {where} again; add such lines up")
        cells[cell] = row["count"]
    if not cells:
        raise FormatError(path, "", "holds no counts; write lines of layer, expert and count")
    snapshots, layers, experts = (sorted({cell[part] for cell in cells}) for part in range(3))
    num_experts = experts[-1] + 1
    if reading.experts is not None and num_experts <= reading.experts:
        num_experts = reading.experts  # the last ones may have no tokens, and no lines
    reading.check_experts(path, "", num_experts)
    shape = len(snapshots), len(layers), num_experts
    if np.prod(shape, dtype=np.float64) > min(MAX_COUNTS, max(_FEW, _MOST_GAPS * len(cells))):
        reason = f"has {shape} snapshots, layers and experts, too many for {len(cells)} lines"
        raise FormatError(path, "", f"{reason}; number experts from 0 on, and give each a line")
    counts_WLE = np.zeros(shape, np.int64)
    for (snapshot, layer, expert), count in cells.items():
        place = np.searchsorted(snapshots, snapshot), np.searchsorted(layers, layer), expert
        counts_WLE[place] = count
    kept, notes = layers_with_experts(path, "", np.asarray(counts_WLE.any(axis=(0, 2))), layers)
    return ForeignLoad(
        counts=list(counts_WLE[:, kept]),
        layers=len(kept),
        experts=num_experts,
        moe_layers=reading.numbers_of(path, len(kept), [layers[place] for place in kept]),
        origin=f"converted from {path.name}",
        notes=notes + _gaps(experts),
    )


def _gaps(experts: list[int]) -> tuple[str, ...]:
    missing = [
        number for a, b in pairwise([-1, *experts]) for number in range(a + 1, min(b, a + 9))
    ]
    if not missing:
        return ()
    shown = ", ".join(map(str, missing[:8]))
    return (f"experts without a line in any layer, {shown}, are taken to have no tokens",)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """(line, numbers by column) of each line with numbers."""
    text = read_text(path)
    first = text[: text.find("\n") if "\n" in text else None]
    delimiter = max(",;\t", key=first.count)
    columns: list[str] = []
    try:
        lines = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
        for row in lines:
            values = [value.strip() for value in row]
            if not any(values):
                continue
            if not columns:
                columns = _columns(path, values)
                if not values[0].isdigit():
                    continue
            yield lines.line_num, _numbers(path, lines.line_num, columns, values)
    except csv.Error as error:
        raise FormatError(path, "", f"is not CSV ({error}); write it anew") from None


def _columns(path: Path, first: list[str]) -> list[str]:
    if all(value.isdigit() for value in first):
        if len(first) == len(_COLUMNS):
            return list(_COLUMNS)
        reason = (
            f"has {len(first)} numbers; begin the file with a line of names, layer,expert,count"
        )
        raise FormatError(path, "line 1", reason)
    names = [_NAMES.get(value.lower(), value.lower()) for value in first]
    wrong = [name for name in _COLUMNS if names.count(name) != 1]
    if wrong or names.count(_SNAPSHOT) > 1:
        reason = f"names no column {wrong[0]!r}" if wrong else "names two columns of snapshots"
        raise FormatError(path, "line 1", f"{reason}; name layer, expert and count, each once")
    return names


def _numbers(path: Path, line: int, columns: list[str], values: list[str]) -> dict[str, int]:
    if len(values) != len(columns):
        reason = f"has {len(values)} fields, for {len(columns)} columns; mend it"
        raise FormatError(path, f"line {line}", reason)
    numbers = {}
    for name, value in zip(columns, values, strict=True):
        if name not in _MOST:
            continue
        if not (value.isascii() and value.isdigit()) or len(value) > 16 or int(value) > _MOST[name]:
            reason = f"has {name} {value[:40]!r}, not a whole number up to {_MOST[name]}; mend it"
            raise FormatError(path, f"line {line}", reason)
        numbers[name] = int(value)
    return numbers
