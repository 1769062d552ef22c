"""Starting, pausing, asking and stopping the servers that are compared."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import vllm_eplb_on_cpu

from ep_rebalance.config import PlannerConfig

START_SECONDS = 600
"""A start takes 40 to 60 seconds on two idle cores."""
STOP_SECONDS = 20
LOG_LINES, LOG_COLUMNS = 15, 200


class ServerFailed(RuntimeError):
    """A server that did not start, or died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to serve a model.

    title: what it is called in the table. arguments: for `vllm serve`. environment: beyond what all
    servers get.
    """

    name: str
    title: str
    model: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What all servers have in common. Token and sequence limits hold per rank and step."""

    ranks: int = 2
    step_tokens: int = 256
    max_sequences: int = 32
    max_tokens: int = 640

    def arguments(self) -> list[str]:
        """For `vllm serve`."""
        return [
            *("--data-parallel-size", str(self.ranks)),
            "--enable-expert-parallel",
            "--enforce-eager",
            *("--dtype", "bfloat16"),
            *("--max-model-len", str(self.max_tokens)),
            *("--max-num-batched-tokens", str(self.step_tokens)),
            *("--max-num-seqs", str(self.max_sequences)),
            "--no-enable-prefix-caching",
            *("--num-gpu-blocks-override", "1024"),
            *("--api-server-count", "1"),
        ]

    def environment(self) -> dict[str, str]:
        """Each rank on its own part of the cores that this process may use."""
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // self.ranks)
        parts = (cores[rank * share : (rank + 1) * share] for rank in range(self.ranks))
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


class Server:
    """One `vllm serve` with its children, in a process group of their own.

    A paused server takes no CPU at all; a merely idle one would: vLLM's workers poll for a second
    after each message.
    """

    def __init__(self, variant: Variant, engine: Engine, *, port: int, folder: Path) -> None:
        self.variant = variant
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{variant.name}.log"
        self._engine = engine
        self._port = port
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start and wait until it serves. Raises ServerFailed."""
        if _is_taken(self._port):
            raise ServerFailed(f"port {self._port} is taken; choose others with --port")
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", str(self.variant.model), "--port", str(self._port)]
        command += [*self._engine.arguments(), *self.variant.arguments]
        path = vllm_eplb_on_cpu.install_metadata(self._folder / "path")
        environment = {
            **os.environ,
            **self._engine.environment(),
            "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])),
            **self.variant.environment,
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        await self._wait_until_healthy()

    async def _wait_until_healthy(self) -> None:
        assert self._process is not None
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            for _ in range(2 * START_SECONDS):
                await asyncio.sleep(0.5)
                if self._process.poll() is not None:
                    raise ServerFailed(
                        f"{self.variant.title} ended while starting\n{self.log_tail()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        return
        raise ServerFailed(f"{self.variant.title} did not start in time\n{self.log_tail()}")

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def pause(self) -> None:
        """Stop its processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    def begin_stop(self) -> None:
        """Tell it to end."""
        self.resume()
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """End it and all its children; harmless if it does not run."""
        if self._process is None:
            return
        self.begin_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()
        self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it and all its children at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def status(self) -> dict[str, Any]:
        """`GET /ep_rebalance/status`."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            answer = await client.get("/ep_rebalance/status")
            answer.raise_for_status()
            return dict(answer.json())

    async def call(self, method: str) -> Any:
        """A method of the worker extension, on rank 0."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            answer = await client.post("/collective_rpc", json={"method": method})
            answer.raise_for_status()
            return answer.json()["results"][0]

    def log_tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        shown = [line[:LOG_COLUMNS] for line in lines[-LOG_LINES:]]
        return "\n".join([*shown, f"the whole log: {self.log}"])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Engine steps between two plans, and slots beyond one per expert, of both balancers."""

    interval_steps: int = 64
    redundant: int = 0

    def plugin_config(self) -> dict[str, Any]:
        """All at its default but for the interval: a benchmark's phases are short."""
        snapshots = PlannerConfig().interval_snapshots
        return {
            "window": {"snapshot_steps": max(1, self.interval_steps // snapshots)},
            "planner": {"redundant_experts": self.redundant},
        }

    def eplb_config(self) -> dict[str, Any]:
        """vLLM's own balancer, in the mode that needs no second stream."""
        return {
            "step_interval": self.interval_steps,
            "window_size": self.interval_steps,
            "num_redundant_experts": self.redundant,
            "use_async": False,
            "communicator": "torch_gloo",
        }


def variants(skewed: Path, even: Path, clock: Clock) -> dict[str, Variant]:
    """Everything that can be compared, by name."""
    observe = _plugin_arguments({"mode": "observe"})
    observing = Variant(name="observe", title="contiguous", model=skewed, arguments=observe)
    listed = (
        observing,
        Variant(
            name="rebalance",
            title="ep_rebalance",
            model=skewed,
            arguments=_plugin_arguments({"mode": "rebalance", **clock.plugin_config()}),
        ),
        Variant(name="even", title="even router", model=even, arguments=observe),
        Variant(
            name="eplb",
            title="vLLM EPLB",
            model=skewed,
            arguments=(
                "--enable-eplb",
                *("--eplb-config", json.dumps(clock.eplb_config())),
                *("--worker-extension-cls", vllm_eplb_on_cpu.WORKER_EXTENSION),
            ),
            environment={vllm_eplb_on_cpu.SWITCH: vllm_eplb_on_cpu.VLLM_EPLB},
        ),
        dataclasses.replace(
            observing,
            name="uncounted",
            title="counting off",
            environment={vllm_eplb_on_cpu.SWITCH: vllm_eplb_on_cpu.UNCOUNTED},
        ),
    )
    return {variant.name: variant for variant in listed}


def _plugin_arguments(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--plugin", "ep_rebalance", "--ep-rebalance-config", json.dumps(config))
