"""A server under traffic, to which faults happen, and the next one if it is gone."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from client import Client
from cpu_server import ServerProcess, free_port
from engines import FILE_TRANSFER, PLUGINS, PREPACKED_RELOADS, V032
from history import Asked, Began, Ended, Happened, History, Read, now
from metrics_page import samples
from saved_states import saved_generation
from serving import OPERATOR, PLUGIN, SETTINGS, Server, complete, environment, prompts_by_domain

from ep_rebalance.load.state import read_state
from ep_rebalance.load.trace import TraceReader

TOKENS = 16
CLIENTS = 4
READ_SECONDS = 0.5
MOMENT_SECONDS = 60.0
END_SECONDS = 60.0
REFUSED_SECONDS = 180.0
FAULTS_ON_DEMAND = PLUGINS / "faults_on_demand"
DEMANDS = "FAULTS_ON_DEMAND"

QUICK: dict[str, Any] = {
    "window": {"snapshot_steps": 4, "snapshots": 12, "min_snapshots": 6},
    "planner": {"interval_snapshots": 8, "redundant_experts": 4},
    "migration": {"max_bytes_per_step": 4096},
}
"""Settings with which experts move most of the time. A byte budget of 4 kB a step makes a migration long
enough to be hit in the middle.
"""
TRANSFER = ("--weight-transfer-config", '{"backend": "ipc"}')
"""So that weights can be updated as in RL training; they come from a file."""
QUESTIONS = list(itertools.chain.from_iterable(prompts_by_domain()))


@dataclass(frozen=True, slots=True)
class Layout:
    """arguments: that make the ranks. processes: names of what may be killed, as they call themselves."""

    name: str
    arguments: tuple[str, ...]
    processes: tuple[str, ...]


DATA_PARALLEL = Layout(
    "data-parallel",
    ("--data-parallel-size", "2"),
    ("vllm serve", "EngineCore_DP0", "EngineCore_DP1", "Worker_DP0", "Worker_DP1", "DPCoordinator"),
)
TENSOR_PARALLEL = Layout(
    "tensor-parallel",
    ("--tensor-parallel-size", "2"),
    ("vllm serve", "EngineCore", "Worker_TP0", "Worker_TP1"),
)


@dataclass
class Scene:
    """folder: of logs, state, traces and demands. answers: of one rank, for QUESTIONS."""

    folder: Path
    layout: Layout
    answers: Sequence[Sequence[int]]
    history: History = field(init=False)
    client: Client = field(default_factory=Client)
    life: int = -1
    _server: Server | None = None
    _starting: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history = History(self.folder / "history.jsonl")
        self.history.path.touch()
        for folder in (self.traces, self.demands):
            folder.mkdir()
        (self.folder / "key").write_text(f"{OPERATOR}\n")

    @property
    def state(self) -> Path:
        return self.folder / "kept" / "state.npz"

    @property
    def traces(self) -> Path:
        return self.folder / "traces"

    @property
    def demands(self) -> Path:
        """Where `faults_on_demand` looks for what is to go wrong."""
        return self.folder / "demands"

    @property
    def log(self) -> Path:
        return self.folder / f"life-{self.life}.log"

    @property
    def server(self) -> Server:
        """The one that runs; started if there is none."""
        with self._starting:  # faults ask for it from many threads
            if self._server is None:
                self.start()
        assert self._server is not None
        return self._server

    def settings(self) -> dict[str, Any]:
        self.state.parent.mkdir(exist_ok=True)
        return {
            **SETTINGS,
            **QUICK,
            "state": {"path": str(self.state)},
            "trace": {"path": str(self.traces)},
            "control": {"enabled": True, "api_key_file": str(self.folder / "key")},
        }

    def start(self, *, enter: Sequence[str] = (), **extra: str) -> None:
        """enter: a command that the server runs below. extra: environment variables."""
        self.life += 1
        saved = saved_generation(self.state)
        process, port = self.launched(enter=enter, **extra)
        server = Server(process, port, self.log, TOKENS)
        try:
            asyncio.run(process.ready(server.url))
        except BaseException:
            process.stop()
            raise
        server.authorise(OPERATOR)
        self.history.tell(Began(self.life, now(), saved))
        self._server = server
        if not self._threads:
            self._begin_traffic()

    def launched(self, *, enter: Sequence[str] = (), **extra: str) -> tuple[ServerProcess, int]:
        """The process of a server that nobody has waited for yet, and its port."""
        file = self.folder / "settings.yaml"
        file.write_text(yaml.safe_dump(self.settings()))
        port = free_port()
        variables = {
            **V032.environment([FAULTS_ON_DEMAND, PREPACKED_RELOADS, FILE_TRANSFER]),
            "VLLM_SERVER_DEV_MODE": "1",
            DEMANDS: str(self.demands),
            **extra,
        }
        arguments = (*self.layout.arguments, *PLUGIN, "--ep-rebalance-config", str(file), *TRANSFER)
        process = ServerProcess(
            complete(port, *arguments),
            environment(2, variables),
            self.log,
            enter=enter,
        )
        return process, port

    def refused(self, *, enter: Sequence[str] = ()) -> str:
        """What a server says that does not come up. Raises AssertionError if it does.

        enter: a command that it runs below.
        """
        self.life += 1  # for a log of its own
        log, (process, _) = self.log, self.launched(enter=enter)
        self.life -= 1
        try:
            assert process.wait(REFUSED_SECONDS) != 0
        finally:
            process.stop()
        return log.read_text(errors="replace")

    def stop(self) -> None:
        """The traffic, and the server."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self.discard()

    def discard(self) -> None:
        """The server of a fault that was not held; the next fault gets another one."""
        if self._server is not None:
            server, self._server = self._server, None
            server.process.stop()
            server.close()

    def process(self, name: str) -> psutil.Process:
        """Of the server's, the one whose command line has this name."""
        family = self.server.process.family()
        found = [p for p in family if name in _command(p)]
        assert found, f"no {name} among {sorted(map(_command, family))}"
        return min(found, key=lambda p: p.create_time())

    @contextmanager
    def fault(self, name: str, *, refuses: bool = False) -> Iterator[None]:
        """While it is entered, the fault is there. refuses: whether requests may fail meanwhile."""
        began = now()
        life = self.life
        try:
            yield
        finally:
            self.history.tell(Happened(name, life, began, now(), refuses))

    def end(self) -> None:
        """Ask the server to end, hang up, and wait until it is gone; requests may fail meanwhile."""
        with self.fault("asked to end", refuses=True):
            self.process("vllm serve").terminate()
            self.ended(hang_up=True)

    def ended(self, seconds: float = END_SECONDS, *, hang_up: bool = False) -> float:
        """Wait until the server is gone; returns how long that took. Raises AssertionError if it is not
        in time: then it is made to end.

        hang_up: whether clients give up what they wait for. vLLM 0.32 that is asked to end kills engines that
            do not in 5 s, and then waits for connections whose requests nobody will answer, with the plugin
            or without (test_endings.py).
        """
        server, self._server = self.server, None
        family, began = server.process.family(), now()
        if hang_up:
            self.client.hang_up()
        try:
            code = server.process.wait(seconds)
        except subprocess.TimeoutExpired:
            told = self.log.read_text(errors="replace")[-3000:]
            server.process.stop()
            raise AssertionError(f"not gone after {seconds:g} s:\n{told}") from None
        took = now() - began
        _, alive = psutil.wait_procs(family, timeout=15)
        self.history.tell(Ended(self.life, now(), code, tuple(map(_command, alive))))
        server.process.stop()
        server.close()
        return took

    def wait_until(
        self, done: Callable[[dict[str, Any]], bool], seconds: float = MOMENT_SECONDS
    ) -> dict[str, Any]:
        """The first status of which this holds; the seconds begin when the server has started."""
        server, status = self.server, {}
        end = now() + seconds
        while now() < end:
            server.process.check_alive()
            with suppress(httpx.HTTPError):
                status = server.status()
                if done(status):
                    return status
        raise AssertionError(f"not in {seconds:g} s; status {status}")

    def until(self, moment: str) -> dict[str, Any]:
        """`before` experts move, `during` that, or right `after` a commit."""
        if moment == "before":
            return self.wait_until(lambda s: not s["migrating"])
        if moment == "during":
            return self.wait_until(lambda s: bool(s["migrating"]))
        committed = self.server.status()["plans"]["committed"]
        return self.wait_until(lambda s: s["plans"]["committed"] > committed)

    def serves_on(self, seconds: float = MOMENT_SECONDS) -> None:
        """Answers come that were asked for after now, and the counters go on."""
        began, tokens = now(), self.server.status()["phase_tokens"]["decode"]
        self.wait_until(lambda s: s["phase_tokens"]["decode"] > tokens, seconds)
        while now() < began + seconds:
            if any(
                isinstance(e, Asked) and e.began > began and e.status == 200 for e in self.history
            ):
                return
            time.sleep(0.3)
        raise AssertionError(f"no answer in {seconds:g} s")

    def demand(self, what: str, seconds: float = MOMENT_SECONDS) -> None:
        """Let `faults_on_demand` do this once; returns when it did."""
        file = self.demands / what
        file.touch()
        end = now() + seconds
        while file.exists():
            assert now() < end, f"{what} was not done in {seconds:g} s"
            time.sleep(0.1)

    def ask(self, question: int) -> Asked:
        server, life, began = self._server, self.life, now()
        status, answer = 0, None
        if server is not None:
            body = server.body(QUESTIONS[question])
            status, told = self.client.post(server.url, "/v1/completions", body)
            if told is not None:
                (choice,) = told["choices"]
                # A server that is asked to end breaks answers off, with status 200.
                cut = choice["finish_reason"] == "abort"
                status, answer = (0, None) if cut else (status, tuple(choice["token_ids"]))
        return Asked(life, began, now(), question, answer, status)

    def _begin_traffic(self) -> None:
        for client in range(CLIENTS):
            self._threads.append(threading.Thread(target=self._traffic, args=(client,)))
        self._threads.append(threading.Thread(target=self._readings))
        for thread in self._threads:
            thread.start()

    def _traffic(self, client: int) -> None:
        """One domain after the other, so that the load shifts; all clients are at the same."""
        for turn in itertools.count():
            if self._stopped.is_set():
                return
            if self._server is None:
                time.sleep(0.1)
                continue
            number = (turn * CLIENTS + client) % len(QUESTIONS)
            asked = self.ask(number)
            self.history.tell(asked)
            if asked.status != 200:
                time.sleep(0.2)

    def _readings(self) -> None:
        while not self._stopped.wait(READ_SECONDS):
            server, life = self._server, self.life
            if server is None:
                continue
            with suppress(httpx.HTTPError, RuntimeError, AssertionError):
                status, seen = server.status(), samples(server)
                counters = {
                    ",".join(key): value
                    for key, value in seen.items()
                    if key[0].endswith(("_total", "_count", "_bucket"))
                }
                self.history.tell(
                    Read(
                        life,
                        now(),
                        status["generation"],
                        status["plans"],
                        status["weight_reloads"],
                        counters,
                    )
                )


class Scenes:
    """One at a time: two cores serve one server."""

    def __init__(self, folder: Path, answers: list[list[int]]) -> None:
        self._folder, self._answers = folder, answers
        self._scene: Scene | None = None

    def of(self, layout: Layout) -> Scene:
        if self._scene is None or self._scene.layout != layout:
            self.close()
            self._scene = Scene(self._folder / layout.name, layout, self._answers)
        return self._scene

    def close(self) -> None:
        if self._scene is not None:
            self._scene.stop()
            self._scene = None


def assert_readable(scene: Scene) -> None:
    """The state is whole, and so is every record of every trace."""
    if scene.state.exists():
        read_state(scene.state)
    for path in sorted(scene.traces.rglob("*.eptrace")):
        for _ in TraceReader(path):
            pass


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """The process stands still."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def spread(seed: int, most_seconds: float) -> None:
    """Wait a moment that the seed chooses, so that a fault does not always hit the same step."""
    time.sleep(random.Random(seed).uniform(0.0, most_seconds))


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
