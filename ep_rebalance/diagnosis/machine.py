"""Python, processor, memory, accelerators and their links."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any

from ep_rebalance.diagnosis.finding import Check, Finding

_LEAST_PYTHON = (3, 11)
_LEAST_CPU_BYTES = 8 << 30


def checks() -> list[tuple[str, Check]]:
    """(name, check) pairs."""
    return [
        ("Python", python),
        ("processor", processor),
        ("memory", memory),
        ("accelerators", accelerators),
        ("links", links),
    ]


def python() -> Finding:
    """Whether this Python is new enough."""
    found = platform.python_version()
    if sys.version_info < _LEAST_PYTHON:
        return Finding(
            check="Python", verdict="problem", found=found, remedy="use Python 3.11 or later"
        )
    return Finding(check="Python", verdict="ok", found=found)


def processor() -> Finding:
    """vLLM's CPU kernels need AVX2 on x86; with an accelerator the processor does not matter."""
    cores, architecture = len(os.sched_getaffinity(0)), platform.machine()
    if architecture != "x86_64":
        return Finding(check="processor", verdict="ok", found=f"{cores} cores, {architecture}")
    flags = Path("/proc/cpuinfo").read_text(errors="replace").split()
    found = f"{cores} cores, {'AVX2' if 'avx2' in flags else 'no AVX2'}"
    if _devices() or "avx2" in flags:
        return Finding(check="processor", verdict="ok", found=found)
    return Finding(
        check="processor",
        verdict="problem",
        found=found,
        remedy="vLLM's CPU build needs AVX2: use a processor from 2015 or later, or a GPU",
    )


def memory() -> Finding:
    """How much memory is available without swapping, including what the file cache would give back."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    found = f"{free / 2**30:.1f} GiB available"
    if _devices() or free >= _LEAST_CPU_BYTES:
        return Finding(check="memory", verdict="ok", found=found)
    return Finding(
        check="memory",
        verdict="warning",
        found=found,
        remedy="two ranks of a small model on CPU need about 8 GiB",
    )


def accelerators() -> Iterator[Finding]:
    """One finding for each accelerator that torch can use, or a warning that there is none."""
    devices = _devices()
    if not devices:
        yield Finding(
            check="accelerators",
            verdict="warning",
            found="none that torch can use",
            remedy="on CPU everything runs, but slowly; for GPUs install torch's CUDA build",
        )
    for index, device in enumerate(devices):
        found = (
            f"{device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB"
        )
        yield Finding(check=f"accelerator {index}", verdict="ok", found=found)


def links() -> Finding:
    """Whether accelerators are linked by NVLink, and NCCL's version."""
    count = len(_devices())
    if count == 0:
        return Finding(check="links", verdict="skipped", found="no accelerators")
    torch = import_module("torch")
    nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if count == 1:
        return Finding(check="links", verdict="skipped", found=f"one accelerator, {nccl}")
    kinds = link_kinds(_topology())
    if kinds and all(kind.startswith("NV") for kind in kinds):
        return Finding(check="links", verdict="ok", found=f"NVLink, {nccl}")
    peers = all(torch.cuda.can_device_access_peer(a, b) for a, b in permutations(range(count), 2))
    access = "peer access" if peers else "no peer access"
    return Finding(
        check="links",
        verdict="warning",
        found=", ".join(["/".join(sorted(kinds)) or "not NVLink", access, nccl]),
        remedy="all-to-all will be slow: see what `ep-rebalance advise` says about slow links",
    )


def link_kinds(topology: str) -> set[str]:
    """The kinds of links between GPUs in the output of `nvidia-smi topo -m`: NV18 for NVLink, SYS, PIX."""
    cells = [line.split() for line in re.sub(r"\x1b\[\d*m", "", topology).splitlines()]
    rows = [row for row in cells if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return {kind for row in rows for kind in row[1 : len(rows) + 1]} - {"X"}


def _topology() -> str:
    """The output of `nvidia-smi topo -m` up to its legend; "" if there is no such command."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    done = subprocess.run([command, "topo", "-m"], capture_output=True, text=True, timeout=20)
    return done.stdout.partition("Legend")[0]


def _devices() -> list[Any]:
    try:
        torch = import_module("torch")
    except ImportError:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(index) for index in range(count)]
