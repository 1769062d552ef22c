"""What a benchmark ran on, for the line below its table."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """What the numbers depend on; a package that is not installed is left out."""
    described: dict[str, Any] = {
        "CPU": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(psutil.virtual_memory().total / 2**30),
        "Python": platform.python_version(),
    }
    for name in ("ep-rebalance", "vllm", "torch", "numba", "numpy"):
        try:
            described[name] = version(name)
        except PackageNotFoundError:
            continue
    return described


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
