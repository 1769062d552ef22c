"""The demo's server: a real `vllm serve` with the plugin, in a session of its own.

Whatever happens to the demo, `Server.stop` leaves no process of that session behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

HOST = "127.0.0.1"
MODEL_NAME = "tiny-moe"
MAX_MODEL_LEN = 512
START_SECONDS = 600.0
STOP_SECONDS = 20.0
LOG_LINES_SHOWN = 20
LOG_ERROR = re.compile(r"^(?!.* WARNING ).*Error: ")
LOG_NOISE = re.compile(r"nanobind:| - |See https://nanobind|INFO: +127")


class ServerError(Exception):
    """The server cannot be had: what happened, and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the server is started.

    cores: one CPU core for each of the two expert-parallel ranks.
    """

    model: Path
    config: Path
    port: int
    tensor_parallel: bool
    cores: tuple[int, int]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def settings(self) -> dict[str, str]:
        """Environment variables that the server needs on a CPU, without network."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, self.cores)),
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def command(self) -> list[str]:
        ranks = "--tensor-parallel-size" if self.tensor_parallel else "--data-parallel-size"
        return [
            str(Path(sys.executable).parent / "vllm"),
            *("serve", str(self.model), "--served-model-name", MODEL_NAME),
            *("--enable-expert-parallel", ranks, "2"),
            *("--plugin", "ep_rebalance", "--ep-rebalance-config", str(self.config)),
            *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
            # Every answer is to be computed anew, by the experts where they are now.
            "--no-enable-prefix-caching",
            *("--host", HOST, "--port", str(self.port), "--api-server-count", "1"),
        ]

    def as_shell(self) -> str:
        """The same as one line to type."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings().items()]
        return " ".join([*settings, shlex.join(self.command())])


def two_cores() -> tuple[int, int]:
    """The first two CPU cores that this process may use. Raises ServerError if it has one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ServerError(
            f"two expert-parallel ranks need two CPU cores; this process may use {len(cores)}.\n"
            "  remedy: run it on a machine or in a container with two or more "
            "(docker run --cpus 2; taskset may also hide cores)."
        )
    return cores[0], cores[1]


def choose_port(wanted: int | None) -> int:
    """`wanted` if it is free, any free port if it is None. Raises ServerError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise ServerError(
                f"port {wanted} cannot be used: {error.strerror}.\n"
                "  remedy: give another to --port, or leave it out: a free one is found."
            ) from None
        return int(probe.getsockname()[1])


class Server:
    """A `vllm serve` process and all that it starts."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.launch = launch
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def started(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the process; raises ServerError if this Python environment has no vLLM."""
        command = self.launch.command()
        if not Path(command[0]).exists():
            raise ServerError(
                f"there is no vllm beside {sys.executable}.\n"
                "  remedy: `make demo` sets all up, or use a Python with vLLM and ep-rebalance."
            )
        # What is set outside for another server must not change what is shown here.
        foreign = ("EP_REBALANCE_", "VLLM_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=inherited | self.launch.settings(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def ready(self, tell: Callable[[float], None]) -> None:
        """Wait until it serves; `tell` is called with the seconds waited.

        Raises ServerError if it ends, or does not serve within START_SECONDS.
        """
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=self.launch.url, trust_env=False) as client:
            while not await self._answers(client):
                self.check_alive()
                waited = time.monotonic() - began
                if waited > START_SECONDS:
                    raise ServerError(
                        f"the server did not start in {waited:.0f} s.\n{self.log_tail()}"
                    )
                tell(waited)
                await asyncio.sleep(0.5)

    @staticmethod
    async def _answers(client: httpx.AsyncClient) -> bool:
        try:
            for path in ("/health", "/ep_rebalance/status"):
                if (await client.get(path)).status_code != httpx.codes.OK:
                    return False
        except httpx.TransportError:
            return False
        return True

    def check_alive(self) -> None:
        """Raises ServerError, with the end of the log, if the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            raise ServerError(f"the server ended by itself with code {code}.\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server and all that it started: politely, then by force. Blocks until done."""
        if self._process is None:
            return
        known = self._family()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for _ in range(20):
            left = {p for p in known | self._family() if _is_running(p)}
            if not left:
                break
            for process in left:
                _kill(process)
            psutil.wait_procs(left, timeout=0.5)
        self._process = None

    def _family(self) -> set[psutil.Process]:
        """The server, its descendants, and those of its session whose parent is gone already."""
        assert self._process is not None
        family = {p for p in psutil.process_iter() if _session(p) == self._process.pid}
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(psutil.Process(self._process.pid).children(recursive=True))
        return family

    def log_tail(self) -> str:
        """The first errors of the log and its end, and where the whole is."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if not LOG_NOISE.match(line)]
        errors = [line for line in lines[:-LOG_LINES_SHOWN] if LOG_ERROR.search(line)][:3]
        shown = [*errors, "...", *lines[-LOG_LINES_SHOWN:]] if errors else lines[-LOG_LINES_SHOWN:]
        return "\n".join([*(f"  | {line}" for line in shown), f"  the whole log: {self.log}"])


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
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
