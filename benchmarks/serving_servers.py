"""Starting, pausing, asking and stopping the servers that are compared."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import vllm_eplb_on_cpu

from ep_rebalance.config import PlannerConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from cpu_server import NotServing, ServerProcess, cpu_environment, free_port

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
    """What all servers have in common. Token and sequence limits hold per rank and step.

    parallelism: of what the ranks have parts or copies; `data` or `tensor`.
    """

    ranks: int = 2
    parallelism: str = "data"
    expert_parallel: bool = True
    step_tokens: int = 256
    max_sequences: int = 96
    max_tokens: int = 640

    def arguments(self) -> list[str]:
        """For `vllm serve`."""
        return [
            *(f"--{self.parallelism}-parallel-size", str(self.ranks)),
            *(["--enable-expert-parallel"] if self.expert_parallel else []),
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
        share = max(1, len(os.sched_getaffinity(0)) // self.ranks)
        return {
            **cpu_environment(self.ranks, cores_per_rank=share),
            "VLLM_SERVER_DEV_MODE": "1",
            # The time for which a server is paused counts as that of the step it was paused in.
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400",
        }


class Server:
    """One of the servers that are compared.

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
        self._process: ServerProcess | None = None
        self._ran = 0.0
        self._resumed_at: float | None = None

    def now(self) -> float:
        """Seconds for which it has been running and not paused."""
        return self._ran + (time.perf_counter() - self._resumed_at if self._resumed_at else 0.0)

    async def start(self) -> None:
        """Start and wait until it serves. Raises ServerFailed."""
        try:
            free_port(self._port)
        except OSError:
            raise ServerFailed(f"port {self._port} is taken; choose others with --port") from None
        arguments = [str(self.variant.model), "--port", str(self._port)]
        arguments += [*self._engine.arguments(), *self.variant.arguments]
        path = vllm_eplb_on_cpu.install_metadata(self._folder / "path")
        environment = {
            **os.environ,
            **self._engine.environment(),
            "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])),
            **self.variant.environment,
        }
        self._process = ServerProcess(arguments, environment, self.log)
        self._resumed_at = time.perf_counter()
        try:
            await self._process.ready(self.url)
        except NotServing as error:
            raise ServerFailed(f"{self.variant.title} {error}\n{self.log_tail()}") from None

    @property
    def started(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    @property
    def paused(self) -> bool:
        """Whether its time stands still."""
        return self._resumed_at is None

    def pause(self) -> None:
        """Stop its processes where they are; harmless if they are."""
        self._ran, self._resumed_at = self.now(), None
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`; harmless if there is nothing to undo."""
        if self.started and self.paused:
            self._resumed_at = time.perf_counter()
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
        self._process.stop()
        self._ran, self._resumed_at = self.now(), None
        self._process = None

    def kill(self) -> None:
        """End it and all its children at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def report(self, name: str) -> dict[str, Any]:
        """`GET /ep_rebalance/NAME`, with the name `status` or `load`."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            answer = await client.get(f"/ep_rebalance/{name}")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Engine steps between two plans, and slots beyond one per expert, of both balancers.

    window_steps: that vLLM's balancer looks at; all between two plans if None.
    trace: folder in which the contiguous server records its load.
    """

    interval_steps: int = 64
    window_steps: int | None = None
    redundant: int = 0
    trace: Path | None = None

    def observing_config(self) -> dict[str, Any]:
        """Counts as often as the one that rebalances."""
        window = self.plugin_config()["window"]
        trace = {} if self.trace is None else {"trace": {"path": str(self.trace)}}
        return {"mode": "observe", "window": window, **trace}

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
            "window_size": self.window_steps or self.interval_steps,
            "num_redundant_experts": self.redundant,
            "use_async": False,
            "communicator": "torch_gloo",
        }


def variants(skewed: Path, even: Path, clock: Clock) -> dict[str, Variant]:
    """Everything that can be compared, by name."""
    observing = Variant(
        name="observe",
        title="contiguous",
        model=skewed,
        arguments=_plugin_arguments(clock.observing_config()),
    )
    listed = (
        observing,
        Variant(
            name="rebalance",
            title="ep_rebalance",
            model=skewed,
            arguments=_plugin_arguments({"mode": "rebalance", **clock.plugin_config()}),
        ),
        Variant(
            name="even",
            title="even router",
            model=even,
            arguments=_plugin_arguments({"mode": "observe"}),
        ),
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
            name="turns",
            title="counting in turns",
            environment={vllm_eplb_on_cpu.SWITCH: vllm_eplb_on_cpu.COUNTING_IN_TURNS},
        ),
    )
    return {variant.name: variant for variant in listed}


def _plugin_arguments(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--plugin", "ep_rebalance", "--ep-rebalance-config", json.dumps(config))
