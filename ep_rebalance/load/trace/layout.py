"""Layout: how the bytes of records lie in a trace, in each version.

There are two kinds of records, each of a size that follows from the head. Integers and floats are
little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ep_rebalance.load.dates import has_date
from ep_rebalance.load.snapshot import Agreed
from ep_rebalance.load.trace.checksums import checksum_of_record
from ep_rebalance.load.trace.records import (
    MigrationEnd,
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
)
from ep_rebalance.load.window import PHASES
from ep_rebalance.placement import Placement

_SNAPSHOT, _PLACEMENT = 1, 2
_FRAME = [("kind", "<u8"), ("checksum", "<u8")]
_NONE_ENDED = -1
_MAX_NUMBER = 1 << 53
_MAX_STEPS, _MAX_STEP_SECONDS = 1 << 31, 1e9
"""Of a snapshot, so that those of a trace can be added up."""

_FLAGS = (
    *("planned", "scheduled", "proposed", "fitted"),
    *("paused", "plan_asked", "replaced"),
)
"""Fields of `Agreed` in a snapshot's `flags`, from the lowest bit. Version 1 has the first two."""
_ABANDONED = 1 << len(_FLAGS)


@dataclass(frozen=True, slots=True)
class Layout:
    """The structured types of a trace's records. Their sizes are multiples of 8 bytes."""

    snapshot: np.dtype[np.void]
    placement: np.dtype[np.void]

    @classmethod
    def of(cls, head: TraceHead) -> Layout:
        """The layout of a trace's records, in the version that its head names."""
        slots = (head.layers, head.slots)
        padding = [("padding", "V4")] if head.layers * head.slots % 2 else []
        numbers = [("time", "<f8"), ("step", "<i8"), ("generation", "<i8")]
        steps = [("steps", "<i8"), ("step_seconds", "<f8"), ("flags", "<u8")]
        counts = ("counts", "<u4", (len(PHASES), head.layers, head.experts))
        return cls(
            snapshot=np.dtype([*_FRAME, *numbers, *steps, *_since_version_2(head), counts]),
            placement=np.dtype(
                [*_FRAME, *numbers, ("quotas", "<f8", slots), ("slots", "<i4", slots), *padding]
            ),
        )

    def of_kind(self, kind: int) -> np.dtype[np.void] | None:
        """The type of records of a kind; None if there is no such kind."""
        return {_SNAPSHOT: self.snapshot, _PLACEMENT: self.placement}.get(kind)


def _since_version_2(head: TraceHead) -> list[Any]:
    if head.version == 1:
        return []
    layers = -(-head.layers // 8) * 8  # one byte for each layer, rounded up to keep the alignment
    return [("unscheduled_ranks", "<i8"), ("batches", "<i8"), ("reloaded", "u1", layers)]


def encode_record(record: Record, layout: Layout) -> bytes:
    """A record's bytes, in the newest version."""
    if isinstance(record, RecordedPlacement):
        return _encode_placement(record, layout.placement)
    return _encode_snapshot(record, layout.snapshot)


def _encode_snapshot(snapshot: RecordedSnapshot, layout: np.dtype[np.void]) -> bytes:
    agreed, ended = snapshot.agreed, snapshot.ended
    flags = sum(getattr(agreed, name) << bit for bit, name in enumerate(_FLAGS))
    if ended is not None and ended.abandoned:
        flags |= _ABANDONED
    reloaded = np.zeros(layout["reloaded"].shape, np.uint8)
    reloaded[list(agreed.reloaded)] = 1
    values = {
        "time": snapshot.time,
        "step": snapshot.step,
        "generation": snapshot.generation,
        "steps": snapshot.steps,
        "step_seconds": snapshot.step_seconds,
        "flags": flags,
        "unscheduled_ranks": agreed.unscheduled_ranks,
        "batches": _NONE_ENDED if ended is None else ended.batches,
        "reloaded": reloaded,
        "counts": snapshot.counts_ALE,
    }
    return _encode(_SNAPSHOT, layout, values)


def _encode_placement(change: RecordedPlacement, layout: np.dtype[np.void]) -> bytes:
    values = {
        "time": change.time,
        "step": change.step,
        "generation": change.generation,
        "quotas": change.quotas_LP,
        "slots": change.placement.slots_LP,
    }
    return _encode(_PLACEMENT, layout, values)


def decode_record(record: np.void, head: TraceHead) -> Record:
    """The record in a whole, checked array element. Raises ValueError for numbers that cannot be."""
    if fault := _fault(record):
        raise ValueError(fault)
    if record["kind"] == _SNAPSHOT and (fault := _fault_of_snapshot(record, head)):
        raise ValueError(fault)
    numbers: dict[str, Any] = {
        "time": float(record["time"]),
        "step": int(record["step"]),
        "generation": int(record["generation"]),
    }
    if record["kind"] == _SNAPSHOT:
        return RecordedSnapshot(
            counts_ALE=record["counts"],
            steps=int(record["steps"]),
            step_seconds=float(record["step_seconds"]),
            agreed=_agreed(record, head.version),
            ended=_ended(record, head.version),
            **numbers,
        )
    placement = Placement(record["slots"], head.experts, head.ep_size)
    placement.check_quotas(record["quotas"])
    return RecordedPlacement(placement=placement, quotas_LP=record["quotas"].copy(), **numbers)


def _fault(record: np.void) -> str:
    """Which of the numbers that all kinds have cannot be, or ""."""
    if not has_date(float(record["time"])):
        return f"it cannot be of time {record['time']}"
    numbers = (record["step"], record["generation"])
    if min(numbers) < 0 or max(numbers) > _MAX_NUMBER:
        return f"step {record['step']} of generation {record['generation']} cannot be"
    return ""


def _fault_of_snapshot(record: np.void, head: TraceHead) -> str:
    """Which of a snapshot's own numbers cannot be, or ""."""
    steps, seconds = record["steps"], record["step_seconds"]
    if steps > _MAX_STEPS:
        return f"a snapshot of {steps} steps cannot be"
    if seconds > _MAX_STEP_SECONDS:
        return f"a step cannot take {seconds} seconds"
    if head.version == 1:
        return ""
    unscheduled, batches = record["unscheduled_ranks"], record["batches"]
    if not 0 <= unscheduled <= head.ep_size or batches < _NONE_ENDED:
        return f"{unscheduled} ranks without rounds, {batches} batches cannot be"
    if record["reloaded"][head.layers :].any():
        return f"layers beyond the {head.layers} cannot be reloaded"
    return ""


def _agreed(record: np.void, version: int) -> Agreed:
    """What the ranks agreed on. Version 1 recorded less; what it lacks is taken to have gone well."""
    flags = int(record["flags"])
    told: dict[str, Any] = {name: bool(flags >> bit & 1) for bit, name in enumerate(_FLAGS)}
    if version == 1:
        return Agreed(**told | {"proposed": told["planned"], "fitted": True})
    counted = {
        "unscheduled_ranks": int(record["unscheduled_ranks"]),
        "reloaded": tuple(np.flatnonzero(record["reloaded"]).tolist()),
    }
    return Agreed(**told | counted)


def _ended(record: np.void, version: int) -> MigrationEnd | None:
    if version == 1 or record["batches"] == _NONE_ENDED:
        return None
    abandoned = bool(int(record["flags"]) & _ABANDONED)
    return MigrationEnd(batches=int(record["batches"]), abandoned=abandoned)


def _encode(kind: int, layout: np.dtype[np.void], values: Mapping[str, Any]) -> bytes:
    record = np.zeros(1, layout)
    record["kind"] = kind
    for name, value in values.items():
        record[name] = value
    record["checksum"] = checksum_of_record(record.tobytes())  # which leaves this field out
    return record.tobytes()
