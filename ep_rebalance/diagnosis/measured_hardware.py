"""Figures of this machine, measured: memory bandwidth, a matrix product, and the link between accelerators.

They are what `ep-rebalance hardware` prints for others. Each is the best of several tries in half a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_SECONDS = 0.5
_COPIED_BYTES = 256 << 20
_SIDE, _SIDE_ON_CPU = 8192, 1024
"""Rows and columns of the matrices: large enough to reach the peak, small enough for half a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredHardware:
    """What was measured.

    device: in words.
    figures: those of `Hardware` that one machine can tell, by name.
    how: a clause for each of them.
    """

    device: str
    figures: Mapping[str, float]
    how: Mapping[str, str]


def measure_hardware() -> MeasuredHardware:
    """Measure the first accelerator that torch can use, or the processor; takes some seconds.

    Without a second accelerator there is no link to measure, and `intranode` is left out. On CPU it is half
    the memory bandwidth: a rank's copy to another is read and written in the same memory.
    """
    torch = import_module("torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return _accelerator(torch, count) if count else _processor(torch)


def _accelerator(torch: Any, count: int) -> MeasuredHardware:
    device, properties = torch.device("cuda", 0), torch.cuda.get_device_properties(0)
    memory, memory_how = _memory(torch, device)
    flops, flops_how = _product(torch, device, torch.bfloat16, _SIDE)
    figures = {
        "memory_bytes_per_second": memory,
        "flops_per_second": flops,
        "memory_bytes": float(properties.total_memory),
    }
    how = {
        "memory_bytes_per_second": memory_how,
        "flops_per_second": flops_how,
        "memory_bytes": "as the driver says",
    }
    if count > 1:
        here, there = (
            torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=torch.device("cuda", number))
            for number in (0, 1)
        )
        seconds = _best_seconds(lambda: there.copy_(here), lambda: torch.cuda.synchronize())
        figures["intranode"] = _COPIED_BYTES / seconds
        how["intranode"] = f"measured: {_COPIED_BYTES >> 20} MiB from accelerator 0 to 1"
    return MeasuredHardware(device=str(properties.name), figures=figures, how=how)


def _processor(torch: Any) -> MeasuredHardware:
    device = torch.device("cpu")
    memory, memory_how = _memory(torch, device)
    flops, flops_how = _product(torch, device, torch.float32, _SIDE_ON_CPU)
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:"))
    return MeasuredHardware(
        device=f"CPU, {torch.get_num_threads()} threads",
        figures={
            "memory_bytes_per_second": memory,
            "flops_per_second": flops,
            "intranode": memory / 2.0,
            "memory_bytes": float(total),
        },
        how={
            "memory_bytes_per_second": memory_how,
            "flops_per_second": flops_how,
            "intranode": "formula: half the memory bandwidth, since ranks copy through the same memory",
            "memory_bytes": "/proc/meminfo, of all ranks here together",
        },
    )


def _memory(torch: Any, device: Any) -> tuple[float, str]:
    """(bytes per second, how)."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), _waiting(torch, device))
    # A copy reads each byte and writes one.
    return 2.0 * _COPIED_BYTES / seconds, f"measured: a copy of {_COPIED_BYTES >> 20} MiB"


def _product(torch: Any, device: Any, dtype: Any, side: int) -> tuple[float, str]:
    """(operations per second, how)."""
    # Random values: a GPU that adds up equal ones needs less power, and so is faster than with real ones.
    left, right = (torch.randn((side, side), dtype=dtype, device=device) for _ in range(2))
    out = torch.empty((side, side), dtype=dtype, device=device)
    seconds = _best_seconds(lambda: torch.matmul(left, right, out=out), _waiting(torch, device))
    kind = str(dtype).removeprefix("torch.")
    return 2.0 * side**3 / seconds, f"measured: a product of {side} x {side} matrices in {kind}"


def _waiting(torch: Any, device: Any) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


def _best_seconds(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Of the fastest of at least three runs."""
    run()  # what is set up at the first use does not count
    wait()
    best, ended = float("inf"), time.perf_counter() + _SECONDS
    tries = 0
    while tries < 3 or time.perf_counter() < ended:
        began = time.perf_counter()
        run()
        wait()
        best, tries = min(best, time.perf_counter() - began), tries + 1
    return max(best, 1e-9)
