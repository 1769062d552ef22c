"""Compilation ahead of time: before serving, and if possible while the engine loads its weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from subprocess import DEVNULL

from ep_rebalance.migration import compile_schedule
from ep_rebalance.planning.policies import compile_planner

_PROGRAM = "from ep_rebalance.balancer.ahead_of_time import compile_all; compile_all()"


def compile_all() -> None:
    """Compile planner and scheduler. Every rank needs the planner's code too, to fit quotas."""
    compile_schedule()
    compile_planner()


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
