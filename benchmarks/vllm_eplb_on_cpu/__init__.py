"""A vLLM plugin for benchmarks: vLLM's own expert balancer (`--enable-eplb`) on CPU, and a server
that counts in every second step.

vLLM offers `--enable-eplb` on GPUs only. What is added here lets its own code - `EplbState`, its
default policy, its weight exchange over gloo - run on CPU unchanged, so that it can be measured
beside ep_rebalance in one run. The transport of tokens is ep_rebalance's all-to-all in both, and so
is the order in which outputs are summed.

`install_metadata` makes the entry point that vLLM looks for; nothing happens without the
environment variable SWITCH.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SWITCH = "EP_BENCHMARK_SERVER"
"""Environment variable: what this plugin does to a server."""

STEPS_FOLDER = "EP_BENCHMARK_STEPS"
"""Environment variable: folder for what each step counted, and the maps; unset, nothing is kept."""

VLLM_EPLB = "vllm-eplb"
COUNTING_IN_TURNS = "counting-in-turns"
MEMORY = "memory"

WORKER_EXTENSION = f"{__name__}.worker.WorkerExtension"

_METADATA = "Metadata-Version: 2.1\nName: ep-rebalance-benchmark\nVersion: 0\n"
_ENTRY_POINTS = f"[vllm.general_plugins]\nep_rebalance_benchmark = {__name__}:register\n"


def install_metadata(folder: Path) -> str:
    """Make `folder` hold an installed distribution's metadata; returns the PYTHONPATH to it."""
    information = folder / "ep_rebalance_benchmark-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text(_METADATA)
    (information / "entry_points.txt").write_text(_ENTRY_POINTS)
    return os.pathsep.join([str(folder), str(Path(__file__).parents[1])])


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every process of every server of a benchmark."""
    wanted = os.environ.get(SWITCH)
    if wanted == VLLM_EPLB:
        _allow_eplb()
    elif wanted == COUNTING_IN_TURNS:
        after_kernel_scan(_count_in_turns)
    elif wanted == MEMORY:
        after_kernel_scan(_tell_memory)


def _allow_eplb() -> None:
    """Let the configuration pass that refuses `enable_eplb` on CPU."""
    import vllm.config.parallel as parallel

    if not isinstance(parallel.current_platform, _GpuInName):
        parallel.current_platform = _GpuInName(parallel.current_platform)


class _GpuInName:
    """The platform, but that it says yes to the one question that keeps `enable_eplb` off a CPU."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


def after_kernel_scan(change: Callable[[], None]) -> None:
    """Make a change that imports ep_rebalance, in a worker, when its kernels are set up.

    vLLM 0.32 scans all loaded modules for kernels then, and fails on those of numba.
    """
    from vllm.platforms import current_platform

    original = current_platform.register_triton_kernel_overrides

    def set_up() -> None:
        original()
        change()

    type(current_platform).register_triton_kernel_overrides = staticmethod(set_up)


def _tell_memory() -> None:
    """Give the plugin's workers the method that those of vLLM alone have from their extension."""
    from ep_rebalance.engines.vllm.worker_extension import WorkerExtension
    from vllm_eplb_on_cpu import memory

    method = memory.WorkerExtension.ep_benchmark_memory
    setattr(WorkerExtension, method.__name__, method)


def _count_in_turns() -> None:
    """Take out of every second step all that mode observe adds to it: counting, phases, snapshots.

    Steps without it are recorded as if they had moved experts, which nothing does in that mode.
    """
    import itertools
    import time

    from ep_rebalance.balancer.rebalancer import Rebalancer
    from ep_rebalance.routing.device_tables import RoutingTables

    count, mark_tokens, step = RoutingTables.count, RoutingTables.mark_tokens, Rebalancer.step
    turns = itertools.cycle((True, False, False, True))
    counts_now = [next(turns)]

    def count_in_turn(
        self: Any, layer: int, topk_ids_TK: Any, first_token: int, end_token: int | None = None
    ) -> None:
        if counts_now[0]:
            count(self, layer, topk_ids_TK, first_token, end_token)

    def mark_in_turn(self: Any, phases_T: Any) -> None:
        if counts_now[0]:
            mark_tokens(self, phases_T)

    def step_in_turn(self: Any, started: float | None, continues: bool = False) -> None:
        if counts_now[0]:
            step(self, started, continues)
        else:
            now = time.perf_counter()
            self.step_times.end(started, now, continues=continues, migrated=True)
        counts_now[0] = next(turns)

    RoutingTables.count = count_in_turn
    RoutingTables.mark_tokens = mark_in_turn
    Rebalancer.step = step_in_turn
