"""Trace: recorded load on disk, for replays."""

from ep_rebalance.load.trace.error import TraceError
from ep_rebalance.load.trace.reader import TraceReader, check_same_load, read_records
from ep_rebalance.load.trace.records import (
    MigrationEnd,
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
)
from ep_rebalance.load.trace.writer import SUFFIX, TraceWriter

__all__ = [
    "SUFFIX",
    "MigrationEnd",
    "Record",
    "RecordedPlacement",
    "RecordedSnapshot",
    "TraceError",
    "TraceHead",
    "TraceReader",
    "TraceWriter",
    "check_same_load",
    "read_records",
]
