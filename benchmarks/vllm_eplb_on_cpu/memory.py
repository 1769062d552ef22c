"""In the worker: what it holds of memory, threads and files."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import psutil


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`. Bytes: `uordblks` in use in arenas, `fordblks` free there, `hblkhd` in
    mapped blocks.
    """

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


class WorkerExtension:
    """Methods for `collective_rpc`."""

    def ep_benchmark_memory(self) -> dict[str, int]:
        """Of this rank's process. Bytes, or numbers."""
        process = psutil.Process()
        heap = _mallinfo()
        return {
            "uss": process.memory_full_info().uss,
            "heap": heap.uordblks + heap.hblkhd,
            "heap_free": heap.fordblks,
            "objects": len(gc.get_objects()),
            "numba": _numba_allocations(),
            "threads": threading.active_count(),
            "native_threads": process.num_threads(),
            "descriptors": process.num_fds(),
            "files": len(process.open_files()),
        }


def _mallinfo() -> Any:
    call = ctypes.CDLL(None).mallinfo2
    call.restype = _Mallinfo
    return call()


def _numba_allocations() -> int:
    """Blocks that numba's runtime has allocated and not freed; 0 where nothing compiled has run yet.

    It counts only with NUMBA_NRT_STATS=1.
    """
    from numba.core.runtime import rtsys

    try:
        stats = rtsys.get_allocation_stats()
    except RuntimeError:  # its runtime has not begun
        return 0
    return int(stats.alloc - stats.free)
