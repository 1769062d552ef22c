"""What is compiled before serving, and how an engine has it done while it loads its weights."""

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
    """Planner and scheduler. Every rank fits quotas, so that every rank needs the planner's code."""
    compile_schedule()
    compile_planner()


def compile_in_background() -> None:
    """Begin with what takes longest of a start, while an engine loads its weights: half a minute of one
    core, where planner and scheduler were never compiled before.

    A process of its own does it and leaves the machine code on disk, where numba can write there: a thread
    would keep the interpreter lock from the loader.
    """
    threading.Thread(target=_compile_elsewhere, name="ep_rebalance-compile", daemon=True).start()


def _compile_elsewhere() -> None:
    program = [sys.executable, "-P", "-c", _PROGRAM]
    with suppress(OSError):
        subprocess.run(program, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, check=False)
