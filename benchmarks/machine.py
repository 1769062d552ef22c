"""What a benchmark ran on, for the line below its table."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, str]:
    """Processor, cores that may be used, and versions."""
    described = {"processor": _processor(), "cores": str(len(os.sched_getaffinity(0)))}
    for name in ("vllm", "torch", "numba", "numpy"):
        try:
            described[name] = version(name)
        except PackageNotFoundError:
            continue
    return described


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
