"""Recorder: writes the trace of a server, in a thread of its own.

The step path only hands over what a snapshot brought anyway. A disk that is slow, full or gone costs records,
which are counted, and nothing else. It is tried again until it takes records.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ep_rebalance.config import ConfigurationError, TraceConfig
from ep_rebalance.load.snapshot import NOTHING_AGREED, Snapshot
from ep_rebalance.load.trace import (
    MigrationEnd,
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
    TraceWriter,
    folder_lock,
)
from ep_rebalance.migration.served import Served, ServedTokens
from ep_rebalance.placement import Placement
from ep_rebalance.process_lock import TakenError
from ep_rebalance.telemetry.file_health import Stopwatch

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Between two attempts on a disk that refuses."""

NOT_ANSWERED = "the disk has not answered yet"

_WAITING = 64
"""Records that may wait for the disk: 15 MB for DeepSeek-V3."""

_NAME = "load"

Order = Literal["end the file", "check the disk"]


class Recorder:
    """Rank 0's recorder. Its folder is its own until the process ends.

    config: its `path` is set.

    recording: whether snapshots are to be recorded.

    Raises ConfigurationError if another recorder has the folder, or it cannot be written.
    """

    def __init__(self, config: TraceConfig, head: TraceHead) -> None:
        assert config.path is not None
        self.recording = config.record
        self._writer = _writer(config, Path(config.path), head)
        self._dropped = 0  # by the step path, for a disk that is too slow
        self._refused = 0  # by the disk
        self._refusal, self._retry_at = "", 0.0
        self._checking = False
        self._attempt = Stopwatch()
        self._placement: Placement | None = None
        self._waiting: queue.Queue[Record | Order] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="ep_rebalance trace", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Records that the disk was too slow for or refused, and snapshots that others deleted at once."""
        return self._dropped + self._refused + self._writer.lost

    @property
    def fault(self) -> str:
        """Why snapshots are not recorded though they are to be; "" if they are, or need not be."""
        return self._broken or self._refusal if self.recording else ""

    @property
    def answer(self) -> str:
        """`fault`; NOT_ANSWERED if recording was asked for and the disk was not tried since."""
        checking = self.recording and self._checking and not self._broken
        return NOT_ANSWERED if checking else self.fault

    def switch(self, on: bool) -> None:
        """Begin a new file, or end the one that is being written. `answer` will tell what the disk says."""
        if on and (self._refusal or not self.recording):
            self._checking = True
            self._put("check the disk")
        if on != self.recording:
            self.recording = on
            self._placement = None  # so that the new file begins with the placement
            if not on:
                self._put("end the file")

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

    def snapshot_in_parts(
        self,
        snapshot: Snapshot,
        served: Served,
        step: int,
        ended: MigrationEnd | None,
        *,
        earlier: ServedTokens | None,
        earlier_steps: int,
    ) -> None:
        """As `snapshot`, but in two parts if something else served some of the tokens: each with what did.

        earlier: these tokens; None if there are none.
        earlier_steps: how many of the snapshot's steps computed them.
        """
        if earlier is None or not earlier.counts_ALE.any():
            self.snapshot(snapshot, served, step, ended)
            return
        sample, before = snapshot.sample, earlier.served
        steps = min(max(earlier_steps, 1), sample.steps - 1)
        first = replace(
            sample,
            counts_ALE=earlier.counts_ALE,
            steps=steps,
            generation=before.generation,
            placement=before.placement,
            quotas_LP=before.quotas_LP,
        )
        second = replace(
            sample, counts_ALE=sample.counts_ALE - first.counts_ALE, steps=sample.steps - steps
        )
        self.snapshot(
            Snapshot(sample=first, agreed=NOTHING_AGREED), before, step - second.steps, None
        )
        self.snapshot(Snapshot(sample=second, agreed=snapshot.agreed), served, step, ended)

    def flush(self) -> None:
        """Wait until everything handed over has been written, refused or dropped."""
        self._waiting.join()

    @property
    def _broken(self) -> str:
        if not self._thread.is_alive():
            return "the thread that writes the trace has ended; restart the server"
        return self._attempt.overdue("a part of the trace")

    def _put(self, item: Record | Order) -> bool:
        """Hand something to the thread. Returns False if it is lost."""
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._dropped += 1
            return False
        return True

    # What follows runs in the thread.

    def _run(self) -> None:
        while True:
            try:
                item = self._waiting.get(timeout=self._seconds_to_retry())
            except queue.Empty:
                self._try("check the disk")
                continue
            try:
                self._take(item)
            finally:
                self._waiting.task_done()

    def _seconds_to_retry(self) -> float | None:
        """None if nothing is to be tried before something is handed over."""
        if not self._refusal or not self.recording:
            return None
        return max(0.0, self._retry_at - time.monotonic())

    def _take(self, item: Record | Order) -> None:
        if isinstance(item, RecordedPlacement):
            self._writer.note_placement(item)  # also if it cannot be written now
        waits = self._refusal and time.monotonic() < self._retry_at
        if waits and not isinstance(item, str):
            self._refused += 1
        else:
            self._try(item)

    def _try(self, item: Record | Order) -> None:
        try:
            with self._attempt:
                if item == "end the file":
                    self._writer.close()
                elif item == "check the disk":
                    self._writer.check_writable()
                else:
                    self._writer.write(item)
        except BaseException as error:  # a thread that ends would take nothing any more
            self._refused += not isinstance(item, str)
            self._note_refusal(error)
        else:
            self._note_success()
        self._checking = False

    def _note_refusal(self, error: BaseException) -> None:
        before, self._refusal = self._refusal, str(error) or type(error).__name__
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not before:
            logger.warning(
                "ep_rebalance: the trace is not written: %s; the disk is tried again every %g s",
                self._refusal,
                RETRY_SECONDS,
            )

    def _note_success(self) -> None:
        if self._refusal:
            self._refusal = ""
            logger.warning(
                "ep_rebalance: the trace is written again; %d records are lost so far", self.lost
            )


def _writer(config: TraceConfig, folder: Path, head: TraceHead) -> TraceWriter:
    try:
        return TraceWriter(
            folder,
            _NAME,
            head,
            max_file_bytes=config.max_file_bytes,
            max_bytes=config.max_bytes,
            lock=folder_lock(folder, _NAME),
        )
    except TakenError as error:
        raise ConfigurationError(
            f"{error}, and two recorders would delete each other's files.",
            "name a folder of its own in trace.path for each server, or end the other one.",
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"the folder of trace.path={config.path!r} cannot be written ({error}).",
            "create it, let the server write to it, or name another one.",
        ) from None
