"""Compilation ahead of time: before serving, and if possible while the engine loads its weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import DEVNULL

from filelock import FileLock, Timeout

from ep_rebalance.compiled import cache_folder
from ep_rebalance.migration import compile_schedule
from ep_rebalance.planning.incremental.descent import improve_layer
from ep_rebalance.planning.policies import compile_planner

_PROGRAM = "from ep_rebalance.balancer.ahead_of_time import compile_all; compile_all()"
_LOCK = "ep_rebalance.lock"
_PATIENCE_SECONDS = 120.0


def compile_all() -> None:
    """Compile planner and scheduler. Every rank needs the planner's code too, to fit quotas.

    Of all ranks of a host one compiles; the others wait, and take its code from numba's cache.
    """
    with _after_the_first():
        compile_schedule()
        compile_planner()


@contextmanager
def _after_the_first() -> Iterator[None]:
    """Run what follows alone if no other process does, otherwise beside others once that one has ended."""
    folder = cache_folder(improve_layer)
    if folder is None:  # each has to compile for itself
        yield
        return
    lock = FileLock(folder / _LOCK)
    with suppress(OSError):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            with suppress(Timeout):  # of a process that stands still
                lock.acquire(timeout=_PATIENCE_SECONDS)
            lock.release()
    try:
        yield
    finally:
        lock.release()


def compile_in_background() -> None:
    """Begin to compile planner and scheduler: half a minute of one core if they were never compiled before.

    A separate process does it and leaves the machine code in numba's cache on disk, if that can be
    written. A thread would compete with the engine's loader for the interpreter lock.
    """
    threading.Thread(target=_compile_elsewhere, name="ep_rebalance-compile", daemon=True).start()


def _compile_elsewhere() -> None:
    program = [sys.executable, "-P", "-c", _PROGRAM]
    with suppress(OSError):
        subprocess.run(program, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, check=False)
