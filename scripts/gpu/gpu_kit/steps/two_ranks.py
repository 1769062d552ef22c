"""Two processes of a step's own module, one per rank, on one device."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_kit import figures

RANKS = 2
PORT = "GPU_KIT_PORT"
"""Environment variable with a port that is free for the ranks."""

SECONDS_AFTER_A_FAILURE = 10.0
"""That a rank gets to say what it makes of the other one's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How a rank ended. status: of the process; negative if it was ended by a signal."""

    status: int
    figures: dict[str, Any]


def run_two_ranks(
    module: str,
    arguments: Sequence[str],
    seconds: float,
    environment: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> list[RankEnd]:
    """Start `module` twice with `--rank 0` and `--rank 1`; end what still runs after `seconds`.

    environment: added for a rank. The ranks stay in this process's group, so that whoever ends the
    group ends all that they start.
    """
    port = _free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--rank", str(rank), *arguments],
                env={
                    **os.environ,
                    PORT: str(port),
                    figures.VARIABLE: str(folder / str(rank)),
                    **environment(rank),
                },
            )
            for rank in range(RANKS)
        ]
        _wait(processes, seconds)
        return [
            RankEnd(status=process.wait(), figures=figures.read(folder / str(rank)))
            for rank, process in enumerate(processes)
        ]


def ended_badly(ends: Sequence[RankEnd]) -> str:
    """Which ranks did not succeed, or ""."""
    parts = [
        f"rank {rank}: {_end(end)}"
        for rank, end in enumerate(ends)
        if end.status or not end.figures
    ]
    return "; ".join(parts)


def _end(end: RankEnd) -> str:
    if end.status == -signal.SIGKILL:
        return "ended from outside"
    return str(end.figures.get("reason", f"exit status {end.status}"))


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            ends = min(ends, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        time.sleep(0.1)
    for process in processes:
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
