"""Recorder: writes the trace of a server, in a thread of its own.

The step path only hands over what a snapshot brought anyway. A slow or full disk costs records, which are
counted, and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

from ep_rebalance.config import TraceConfig
from ep_rebalance.load.snapshot import Snapshot
from ep_rebalance.load.trace import (
    MigrationEnd,
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
    TraceWriter,
)
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement

logger = logging.getLogger(__name__)

_WAITING = 64
"""Records that may wait for the disk: 15 MB for DeepSeek-V3."""


class Recorder:
    """Rank 0's recorder.

    config: its `path` is set.

    recording: whether snapshots are recorded.
    lost: records that the disk was too slow for, or refused.
    """

    def __init__(self, config: TraceConfig, head: TraceHead) -> None:
        assert config.path is not None
        self.recording = config.record
        self.lost = 0
        self._writer = TraceWriter(
            Path(config.path),
            "load",
            head,
            max_file_bytes=config.max_file_bytes,
            max_bytes=config.max_bytes,
        )
        self._placement: Placement | None = None
        self._waiting: queue.Queue[Record | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._write, name="ep_rebalance trace", daemon=True)
        self._thread.start()

    def switch(self, on: bool) -> None:
        """Begin a new file, or end the one that is being written."""
        if on != self.recording:
            self.recording = on
            self._placement = None  # so that the new file begins with the placement
            if not on:
                self._put(None)

    def snapshot(
        self, snapshot: Snapshot, served: Served, step: int, ended: MigrationEnd | None
    ) -> None:
        """Record what a snapshot brought.

        served: what its steps ran on.
        step: the engine's number of the last of these.
        ended: the migration that ended since the previous snapshot; None if none did.
        """
        if not self.recording:
            return
        now = time.time()
        if served.placement is not self._placement:
            change = RecordedPlacement(
                placement=served.placement,
                quotas_LP=served.quotas_LP,
                generation=served.generation,
                step=step,
                time=now,
            )
            if not self._put(change):
                return  # a snapshot without its placement could not be replayed
            self._placement = served.placement
        self._put(
            RecordedSnapshot(
                counts_ALE=snapshot.sample.counts_ALE,
                step=step,
                steps=snapshot.sample.steps,
                step_seconds=snapshot.sample.step_seconds,
                time=now,
                generation=served.generation,
                agreed=snapshot.agreed,
                ended=ended,
            )
        )

    def flush(self) -> None:
        """Wait until everything handed over has been written."""
        self._waiting.join()

    def _put(self, record: Record | None) -> bool:
        """Hand a record to the thread; None ends the file. Returns False if it is lost."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.lost += 1
            return False
        return True

    def _write(self) -> None:
        while True:
            record = self._waiting.get()
            try:
                if record is None:
                    self._writer.close()
                else:
                    self._writer.write(record)
            except Exception as error:  # a thread that ends would take nothing any more
                self._refused(error)
            finally:
                self._waiting.task_done()

    def _refused(self, error: Exception) -> None:
        """Stop recording: a full disk would refuse the next records too."""
        self.lost += 1
        if self.recording:
            self.recording = False
            logger.warning("ep_rebalance: the trace is no longer written: %s", error)
