"""Trace: recorded load on disk, for replays."""

from ep_rebalance.load.trace.error import TraceError
from ep_rebalance.load.trace.folder import check_folder, folder_lock
from ep_rebalance.load.trace.reader import TraceReader, check_same_load, read_records
from ep_rebalance.load.trace.records import (
    MigrationEnd,
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
)
from ep_rebalance.load.trace.writer import TraceWriter
from ep_rebalance.load.trace_names import SUFFIX

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
    "check_folder",
    "check_same_load",
    "folder_lock",
    "read_records",
]
