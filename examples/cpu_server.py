"""`vllm serve` on a CPU: its environment, its port, and its processes from the first to the last.

The demo, the benchmarks and the tests start their servers with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

HOST = "127.0.0.1"
VLLM = Path(sys.executable).with_name("vllm")
PORTS = range(20_000, 32_000)
START_SECONDS = 600.0
STOP_SECONDS = 20.0


class NotServing(Exception):
    """Why there is no server; the text goes on after "the server"."""


def cpu_environment(ranks: int, *, cores_per_rank: int = 1) -> dict[str, str]:
    """What vLLM's CPU build needs for `ranks` workers, without network.

    Each gets cores of its own, unless there are too few.
    """
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    parts = [",".join(str(next(cores)) for _ in range(cores_per_rank)) for _ in range(ranks)]
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(parts),
        # A connection that the server closes when a client reuses it fails that request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def free_port(wanted: int = 0) -> int:
    """`wanted`, or if it is 0 a free port below those that Linux gives to outgoing connections: one of
    these might take it before the server does. Raises OSError if it is taken.
    """
    for port in [wanted] if wanted else random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                if wanted:
                    raise
                continue
            return port
    raise OSError(f"all ports from {PORTS.start} to {PORTS.stop - 1} are taken")


class ServerProcess:
    """A `vllm serve` and all that it starts, in a process group of their own.

    Not in a session of their own: Linux shares the CPU by session, and on recent kernels (seen on
    6.18) vLLM's polling workers then leave next to nothing to a client in another one.

    arguments: of `vllm serve`. environment: the whole of it. log: its output is appended there.
    enter: a command that runs it elsewhere, as in other namespaces.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        enter: Sequence[str] = (),
    ) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*enter, str(VLLM), "serve", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    async def ready(
        self,
        url: str,
        *,
        paths: Sequence[str] = ("/health",),
        tell: Callable[[float], None] = lambda waited: None,
    ) -> None:
        """Wait until all `paths` answer 200; `tell` is called with the seconds waited.

        Raises NotServing if it ends, or takes longer than START_SECONDS.
        """
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            while not await _answers(client, paths):
                self.check_alive()
                waited = time.monotonic() - began
                if waited > START_SECONDS:
                    raise NotServing(f"did not start in {waited:.0f} s")
                tell(waited)
                await asyncio.sleep(0.5)

    def check_alive(self) -> None:
        """Raises NotServing if it has ended."""
        if (code := self._process.poll()) is not None:
            raise NotServing(f"ended by itself with code {code}")

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Its code, once it has ended. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def send_signal(self, number: signal.Signals) -> None:
        """To all processes of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """End it and all that it started: politely, then by force. Blocks until done."""
        known = self.family()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        for _ in range(20):
            left = {process for process in known | self.family() if _is_running(process)}
            if not left:
                break
            for process in left:
                _kill(process)
            psutil.wait_procs(left, timeout=0.5)
        self._process.wait()

    def family(self) -> set[psutil.Process]:
        """The server, its descendants, and those of its group whose parent is gone already."""
        family = {p for p in psutil.process_iter() if _group(p) == self._process.pid}
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(psutil.Process(self._process.pid).children(recursive=True))
        return family


async def _answers(client: httpx.AsyncClient, paths: Sequence[str]) -> bool:
    try:
        for path in paths:
            if (await client.get(path)).status_code != httpx.codes.OK:
                return False
    except httpx.TransportError:
        return False
    return True


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
