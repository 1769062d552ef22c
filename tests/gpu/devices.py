"""A GPU's ways for tests that run on any device: streams that lag behind, graphs, checks for waits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

LAG_CYCLES = 200_000_000
"""About a tenth of a second of a GPU's clock."""


def no_cuda() -> str:
    """Why a test cannot run on a GPU, or "". Asked in the test's process only: CUDA does not survive
    a fork.
    """
    return "" if torch.cuda.is_available() else "needs a CUDA device"


@functools.cache
def group_of(backend: str) -> dist.ProcessGroup:
    """All ranks, over a backend; collective when it is first asked for."""
    return dist.group.WORLD if backend == "gloo" else dist.new_group(backend=backend)


def keep_busy(device: torch.device) -> None:
    """Let the stream lag behind the host, so that a buffer written too early is seen."""
    if device.type == "cuda":
        torch.cuda._sleep(LAG_CYCLES)


@contextmanager
def waits_refused(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU's stream raises RuntimeError.

    Events that are waited for do not, nor copies that only might wait: those from memory that is not
    pinned.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Graph:
    """A function captured as a CUDA graph; on CPU it is run again, into the same output.

    The function must give one tensor, and run once before it is captured.
    """

    def __init__(self, function: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._function = function
        self.output = function()
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.output = function()

    def replay(self) -> torch.Tensor:
        if self._graph is None:
            self.output.copy_(self._function())
        else:
            self._graph.replay()
        return self.output
