"""Foreign load: other engines' recordings as counts for each snapshot, and the trace made of them."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.contents import FormatError
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceHead, TraceWriter
from ep_rebalance.load.trace.head import fault_of_head
from ep_rebalance.load.window import PHASES
from ep_rebalance.placement import Placement
from ep_rebalance.version import __version__

MAX_COUNTS = 1 << 28
"""Of a recording whose counts are all in memory at a time: 17,000 snapshots of 61 layers of 256 experts."""
_MAX_COUNT = 2**32 - 1
"""Tokens of an expert in one snapshot of a trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLoad:
    """A recording.

    counts: int64 [L, E] for each snapshot, or [A, L, E] where the file tells phases; tokens. Read from the
        file as they are iterated over.
    layers: L.
    experts: E.
    moe_layers: L numbers, those that the layers have in the engine's model; () if the file does not say.
    origin: where it comes from, a sentence for the trace.
    top_k: experts per token; None if the file does not say.
    notes: sentences on what was left out or taken for granted.
    """

    counts: Iterable[NDArray[np.int64]]
    layers: int
    experts: int
    moe_layers: tuple[int, ...]
    origin: str
    top_k: int | None = None
    notes: tuple[str, ...] = ()

    def with_notes(self, notes: tuple[str, ...]) -> ForeignLoad:
        """The same with further notes."""
        return replace(self, notes=self.notes + notes)


def counts_of(
    path: Path, place: str, value: Any, meaning: str = "a number of tokens"
) -> NDArray[np.int64]:
    """int64 [snapshots, L, E], from nested lists or arrays of that shape, or of one snapshot's.

    place: where `value` lies in the file.
    meaning: of a number, for errors.

    Raises FormatError that names the first number that cannot be a count.
    """
    if isinstance(value, np.ndarray) and value.size > MAX_COUNTS:
        # It may be a view of a few bytes, repeated without end.
        raise FormatError(path, place, f"has shape {value.shape}, more than {MAX_COUNTS} counts")
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        raise FormatError(path, place, f"is {value.dtype}, which are no counts; mend it")
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise FormatError(path, *_fault(place, value)) from None
    if numbers.ndim == 2:
        numbers = numbers[None]
    if numbers.ndim != 3 or 0 in numbers.shape:
        raise FormatError(
            path,
            place,
            f"has shape {numbers.shape}; write rows of layers, or of snapshots and layers",
        )
    wrong = ~(np.isfinite(numbers) & (numbers >= 0) & (numbers == np.floor(numbers)))
    wrong |= numbers >= 2.0**53  # where float64 begins to skip numbers
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        # The index in the file, which lacks that of the snapshot if there is only one.
        where = "".join(f"[{i}]" for i in index[3 - np.ndim(value) :])
        raise FormatError(path, f"{place}{where}", f"is {numbers[index]:g}, not {meaning}; mend it")
    return numbers.astype(np.int64)


def _fault(place: str, value: Any) -> tuple[str, str]:
    """(place, reason) of the first thing for which nested lists are no array of numbers."""
    if not isinstance(value, list):
        return place, f"is {str(value)[:40]!r}, not a number; mend it"
    for index, row in enumerate(value):
        if _length(row) != _length(value[0]):
            held = f"has {_length(row)} numbers" if isinstance(row, list) else "is no row"
            return f"{place}[{index}]", f"{held}, unlike those before it; make all alike"
    for index, row in enumerate(value):
        try:
            np.asarray(row, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            return _fault(f"{place}[{index}]", row)
    return place, "has rows of different depths; make all alike"


def _length(row: Any) -> int | None:
    return len(row) if isinstance(row, list) else None


def slots_of(path: Path, place: str, value: Any) -> NDArray[np.int64]:
    """int64 [L, P], from nested lists or an array of that shape. place: where `value` lies in the file.

    Raises FormatError that names the first number that cannot be an expert's.
    """
    found_1LP = counts_of(path, place, value, "an expert's number")
    if np.ndim(value) != 2:
        reason = f"has {np.ndim(value)} dimensions; write rows of slots, one for each layer"
        raise FormatError(path, place, reason)
    slots_LP: NDArray[np.int64] = found_1LP[0]
    return slots_LP


def sampled(
    load: ForeignLoad, *, snapshots: int, tokens: int, top_k: int, seed: int
) -> ForeignLoad:
    """Snapshots drawn from the sum of a recording: its popularities, with the noise of finite samples.

    snapshots: how many.
    tokens: tokens of each.
    """
    total = functools.reduce(np.add, load.counts)  # [L, E] or [A, L, E]
    by_layer = np.atleast_3d(np.moveaxis(total, -2, 0)).reshape(load.layers, -1)
    shares = by_layer / np.maximum(by_layer.sum(axis=1, keepdims=True), 1)
    draw = np.random.default_rng(seed)
    shape = (load.layers, *total.shape[:-2], load.experts)
    drawn = (
        np.moveaxis(draw.multinomial(tokens * top_k, shares).reshape(shape), 0, -2)
        for _ in range(snapshots)
    )
    origin = f"{load.origin}; sampled, {tokens} tokens a snapshot, seed {seed}"
    return replace(load, counts=drawn, origin=origin)


def write_trace(
    load: ForeignLoad,
    path: Path,
    *,
    source: Path,
    model: str,
    top_k: int,
    phase: str,
    steps_per_snapshot: int,
) -> int:
    """Replace `path` by a trace on one rank with contiguous experts. Returns the number of snapshots.

    source: where the recording comes from, for errors.
    phase: the phase that all tokens are counted in, where the recording does not tell phases.
    steps_per_snapshot: engine steps that each snapshot is said to cover.

    Raises FormatError for an empty recording and too large counts, OSError if the folder cannot be written.
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
    if reason := fault_of_head(head):
        raise FormatError(source, "", f"makes no trace: {reason}")
    # In the folder of the target, since a file can be replaced atomically only within a file system.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        # Bounds that are never reached, since the trace is to be one file.
        writer = TraceWriter(Path(folder), "load", head, max_file_bytes=1 << 50, max_bytes=1 << 51)
        count = 0
        with closing(writer):
            writer.write(_contiguous(head))
            for record in _snapshots(load, source, phase, steps_per_snapshot):
                writer.write(record)
                count += 1
        if not count:
            raise FormatError(source, "", "holds no tokens; record while the server has traffic")
        os.replace(writer.files()[0], path)
    return count


def _contiguous(head: TraceHead) -> RecordedPlacement:
    placement = Placement.contiguous(
        num_layers=head.layers, num_experts=head.experts, num_ranks=head.ep_size
    )
    return RecordedPlacement(
        placement=placement, quotas_LP=placement.even_quotas_LP(), generation=0, step=0, time=0.0
    )


def _snapshots(
    load: ForeignLoad, source: Path, phase: str, steps: int
) -> Iterator[RecordedSnapshot]:
    for number, counts in enumerate(load.counts):
        _check_fits(load, source, number, counts)
        counts_ALE = np.zeros((len(PHASES), load.layers, load.experts), dtype=np.uint32)
        counts_ALE[... if counts.ndim == 3 else PHASES.index(phase)] = counts
        yield RecordedSnapshot(
            counts_ALE=counts_ALE,
            step=steps * (number + 1),
            steps=steps,
            step_seconds=0.0,
            time=float(number),
            generation=0,
        )


def _check_fits(load: ForeignLoad, source: Path, number: int, counts: NDArray[np.int64]) -> None:
    if counts.max() <= _MAX_COUNT:
        return
    *_, layer, expert = np.unravel_index(counts.argmax(), counts.shape)
    layer_number = load.moe_layers[layer] if load.moe_layers else layer
    raise FormatError(
        source,
        f"snapshot {number}, layer {layer_number}, expert {expert}",
        f"has {counts.max()} tokens, more than the {_MAX_COUNT} that a trace holds of a snapshot; draw "
        "smaller ones with --sample 200",
    )
