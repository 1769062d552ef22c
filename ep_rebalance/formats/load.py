"""Foreign load: other engines' recordings as counts for each snapshot, and the trace made of them."""

from __future__ import annotations

import os
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceHead, TraceWriter
from ep_rebalance.load.window import PHASES
from ep_rebalance.placement import Placement
from ep_rebalance.regular_files import open_regular
from ep_rebalance.version import __version__

MAX_TEXT_BYTES = 256 << 20
MAX_ARRAY_BYTES = 4 << 30
MAX_COUNTS = 1 << 28
"""Of a recording whose counts are all in memory at a time: 17,000 snapshots of 61 layers of 256 experts."""


class FormatError(ValueError):
    """A file is not what it should be. The text names the file, the place and the reason."""

    def __init__(self, path: Path, place: str, reason: str) -> None:
        super().__init__(f"{path}: {place + ' ' if place else ''}{reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLoad:
    """A recording.

    counts: uint32 [L, E] for each snapshot, tokens. Read from the file as they are iterated over.
    layers: L.
    experts: E.
    moe_layers: L numbers, those that the layers have in the engine's model; () if the file does not say.
    origin: where it comes from, a sentence for the trace.
    top_k: experts per token; None if the file does not say.
    """

    counts: Iterable[NDArray[np.uint32]]
    layers: int
    experts: int
    moe_layers: tuple[int, ...]
    origin: str
    top_k: int | None = None


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A file's text. Raises FormatError if it is too large or not UTF-8, OSError if it cannot be read."""
    _check_size(path, max_bytes)
    try:
        with open_regular(path) as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise FormatError(path, f"byte {error.start}", "is not UTF-8 text") from None


def check_array_size(path: Path) -> None:
    """Raises FormatError for a file whose arrays would be too large for memory."""
    _check_size(path, MAX_ARRAY_BYTES)


def check_unpacked_size(path: Path, archive: zipfile.ZipFile) -> None:
    """The same for what a compressed file would become; no more than it declares is unpacked."""
    size = sum(part.file_size for part in archive.infolist())
    if size > MAX_ARRAY_BYTES:
        raise FormatError(path, "", f"unpacks to {size} bytes, more than {MAX_ARRAY_BYTES}")


def _check_size(path: Path, most: int) -> None:
    if (size := path.stat().st_size) > most:
        raise FormatError(path, "", f"has {size} bytes, more than the {most} that are read")


def counts_of(path: Path, place: str, value: Any) -> NDArray[np.uint32]:
    """uint32 [snapshots, L, E], from nested lists or arrays of that shape, or of one snapshot's.

    place: where `value` lies in the file.

    Raises FormatError that names the first number that cannot be a count.
    """
    if isinstance(value, np.ndarray) and value.size > MAX_COUNTS:
        # It may be a view of a few bytes, repeated without end.
        raise FormatError(path, place, f"has shape {value.shape}, more than {MAX_COUNTS} counts")
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise FormatError(path, place, "is not an array of numbers, or is ragged") from None
    if numbers.ndim == 2:
        numbers = numbers[None]
    if numbers.ndim != 3 or 0 in numbers.shape:
        raise FormatError(
            path,
            place,
            f"has shape {numbers.shape}, not [layers][experts] or [steps][layers][experts]",
        )
    wrong = ~(np.isfinite(numbers) & (numbers >= 0) & (numbers == np.floor(numbers)))
    wrong |= numbers >= 2.0**32
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        # The index in the file, which lacks that of the snapshot if there is only one.
        where = "".join(f"[{i}]" for i in index[3 - np.ndim(value) :])
        raise FormatError(path, f"{place}{where}", f"is {numbers[index]:g}, not a number of tokens")
    return numbers.astype(np.uint32)


def slots_of(path: Path, place: str, value: Any) -> NDArray[np.int32]:
    """int32 [L, P], from nested lists or an array of that shape. place: where `value` lies in the file.

    Raises FormatError that names the first number that cannot be an expert's.
    """
    found_1LP = counts_of(path, place, value)
    if np.ndim(value) != 2:
        raise FormatError(path, place, f"has {np.ndim(value)} dimensions, not [layers][slots]")
    slots_LP: NDArray[np.int32] = found_1LP[0].astype(np.int32)
    return slots_LP


def sampled(
    load: ForeignLoad, *, snapshots: int, tokens: int, top_k: int, seed: int
) -> ForeignLoad:
    """Snapshots drawn from the sum of a recording: its popularities, with the noise of finite samples.

    snapshots: how many.
    tokens: tokens of each.
    """
    total_LE = np.sum([counts.astype(np.float64) for counts in load.counts], axis=0)
    shares_LE = total_LE / np.maximum(total_LE.sum(axis=1, keepdims=True), 1.0)
    draw = np.random.default_rng(seed)
    drawn = (
        draw.multinomial(tokens * top_k, shares_LE).astype(np.uint32) for _ in range(snapshots)
    )
    origin = f"{load.origin}; sampled, {tokens} tokens a snapshot, seed {seed}"
    return replace(load, counts=drawn, origin=origin)


def write_trace(
    load: ForeignLoad,
    path: Path,
    *,
    model: str,
    top_k: int,
    phase: str,
    steps_per_snapshot: int,
) -> int:
    """Replace `path` by a trace on one rank with contiguous experts. Returns the number of snapshots.

    phase: the phase that all tokens are counted in.
    steps_per_snapshot: engine steps that each snapshot is said to cover.

    Raises FormatError for an empty recording, OSError if the folder cannot be written.
    """
    head = TraceHead(
        model=model,
        layers=load.layers,
        experts=load.experts,
        top_k=top_k,
        ep_size=1,
        slots=load.experts,
        node_of_rank=[0],
        expert_bytes=[0] * load.layers,
        moe_layers=list(load.moe_layers),
        hidden_size=0,
        engine="",
        plugin_version=__version__,
        started=time.time(),
        config={},
        origin=f"{load.origin}; its timing is made up",
    )
    # In the folder of the target, since a file can be replaced atomically only within a file system.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        # Bounds that are never reached, since the trace is to be one file.
        writer = TraceWriter(Path(folder), "load", head, max_file_bytes=1 << 50, max_bytes=1 << 51)
        writer.write(_contiguous(head))
        count = 0
        for record in _snapshots(load, phase, steps_per_snapshot):
            writer.write(record)
            count += 1
        writer.close()
        if not count:
            raise FormatError(path, "", f"would be empty: {load.origin} holds no load")
        os.replace(writer.files()[0], path)
    return count


def _contiguous(head: TraceHead) -> RecordedPlacement:
    placement = Placement.contiguous(
        num_layers=head.layers, num_experts=head.experts, num_ranks=head.ep_size
    )
    return RecordedPlacement(
        placement=placement, quotas_LP=placement.even_quotas_LP(), generation=0, step=0, time=0.0
    )


def _snapshots(load: ForeignLoad, phase: str, steps: int) -> Iterator[RecordedSnapshot]:
    for number, counts_LE in enumerate(load.counts):
        counts_ALE = np.zeros((len(PHASES), *counts_LE.shape), dtype=np.uint32)
        counts_ALE[PHASES.index(phase)] = counts_LE
        yield RecordedSnapshot(
            counts_ALE=counts_ALE,
            step=steps * (number + 1),
            steps=steps,
            step_seconds=0.0,
            time=float(number),
            generation=0,
        )
