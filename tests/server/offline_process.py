"""Scripts that serve a model offline, each in a process of its own with all that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cpu_server import START_SECONDS, cpu_environment
from engines import ROOT, Engine

SUPPORT = (ROOT / "tests" / "support", ROOT / "examples")
"""What such scripts import."""


def output_of(
    engine: Engine,
    script: Path,
    *arguments: str,
    plugins: Sequence[Path] = (),
    seconds: float = START_SECONDS,
) -> str:
    """All that it writes, on both channels. Nothing that it started is left."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={
            **os.environ,
            **cpu_environment(2),
            **engine.environment([*SUPPORT, *plugins]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return output
