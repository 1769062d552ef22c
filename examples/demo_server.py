"""The demo's server: a real `vllm serve` with the plugin, and what to say if it cannot be had."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpu_server import HOST, VLLM, NotServing, ServerProcess, cpu_environment, free_port

MODEL_NAME = "tiny-moe"
MAX_MODEL_LEN = 512
RANKS = 2
LOG_LINES_SHOWN = 20
LOG_ERROR = re.compile(r"^(?!.* WARNING ).*Error: ")
LOG_NOISE = re.compile(r"nanobind:| - |See https://nanobind|INFO: +127")


class ServerError(Exception):
    """The server cannot be had: what happened, and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the server is started."""

    model: Path
    config: Path
    port: int
    tensor_parallel: bool
    policy: str
    redundant_experts: int
    trace: Path | None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def settings(self) -> dict[str, str]:
        """Environment variables that the server needs on a CPU, without network."""
        return cpu_environment(RANKS)

    def arguments(self) -> list[str]:
        """Of `vllm serve`."""
        ranks = "--tensor-parallel-size" if self.tensor_parallel else "--data-parallel-size"
        return [
            *(str(self.model), "--served-model-name", MODEL_NAME),
            *("--enable-expert-parallel", ranks, str(RANKS)),
            *("--plugin", "ep_rebalance", "--ep-rebalance-config", str(self.config)),
            *("--ep-rebalance-config.planner.policy", self.policy),
            *("--ep-rebalance-config.planner.redundant_experts", str(self.redundant_experts)),
            *(("--ep-rebalance-config.trace.path", str(self.trace)) if self.trace else ()),
            *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
            # Every answer is to be computed anew, by the experts where they are now.
            "--no-enable-prefix-caching",
            *("--host", HOST, "--port", str(self.port), "--api-server-count", "1"),
        ]

    def as_shell(self) -> str:
        """The same as one line to type."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings().items()]
        return " ".join([*settings, shlex.join([str(VLLM), "serve", *self.arguments()])])


def check_cores() -> None:
    """Raises ServerError if this process may use one CPU core only."""
    cores = len(os.sched_getaffinity(0))
    if cores < RANKS:
        raise ServerError(
            f"two expert-parallel ranks need two CPU cores; this process may use {cores}.\n"
            "  remedy: run it on a machine or in a container with two or more "
            "(docker run --cpus 2; taskset may also hide cores)."
        )


def choose_port(wanted: int | None) -> int:
    """`wanted` if it is free, any free port if it is None. Raises ServerError if it is taken."""
    try:
        return free_port(wanted or 0)
    except OSError as error:
        raise ServerError(
            f"port {wanted} cannot be used: {error.strerror}.\n"
            "  remedy: give another to --port, or leave it out: a free one is found."
        ) from None


class Server:
    """A `vllm serve` process and all that it starts."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.launch = launch
        self.log = log
        self._process: ServerProcess | None = None

    @property
    def started(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the process; raises ServerError if this Python environment has no vLLM."""
        if not VLLM.exists():
            raise ServerError(
                f"there is no vllm beside {sys.executable}.\n"
                "  remedy: `make demo` sets all up, or use a Python with vLLM and ep-rebalance."
            )
        # What is set outside for another server must not change what is shown here.
        foreign = ("EP_REBALANCE_", "VLLM_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        settings = self.launch.settings()
        self.log.write_bytes(b"")
        self._process = ServerProcess(self.launch.arguments(), inherited | settings, self.log)

    async def ready(self, tell: Callable[[float], None]) -> None:
        """Wait until it serves; `tell` is called with the seconds waited. Raises ServerError."""
        assert self._process is not None
        paths = ("/health", "/ep_rebalance/status")
        with self._explained():
            await self._process.ready(self.launch.url, paths=paths, tell=tell)

    def check_alive(self) -> None:
        """Raises ServerError, with the end of the log, if the process has ended."""
        if self._process is not None:
            with self._explained():
                self._process.check_alive()

    def stop(self) -> None:
        """End the server and all that it started; harmless if it was not started."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except NotServing as error:
            raise ServerError(f"the server {error}.\n{self.log_tail()}") from None

    def log_tail(self) -> str:
        """The first errors of the log and its end, and where the whole is."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if not LOG_NOISE.match(line)]
        errors = [line for line in lines[:-LOG_LINES_SHOWN] if LOG_ERROR.search(line)][:3]
        shown = [*errors, "...", *lines[-LOG_LINES_SHOWN:]] if errors else lines[-LOG_LINES_SHOWN:]
        return "\n".join([*(f"  | {line}" for line in shown), f"  the whole log: {self.log}"])
