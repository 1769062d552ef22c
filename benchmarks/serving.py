"""Serve a Mixture-of-Experts model with a skewed router in several ways, side by side, and compare.

Servers, each with two data-parallel ranks that are two expert-parallel ranks:
  contiguous    the plugin only counts; experts lie in order, the hot ones on rank 0
  ep_rebalance  the plugin moves experts
  even router   the same model with a router that uses all experts alike: the best that balancing can do
  vLLM EPLB     vLLM's own balancer, made to run on CPU (vllm_eplb_on_cpu)
  counting in turns  contiguous, but for every second step without counting (--overhead)

In each repetition the balancers start anew and serve from there (phase `moving`); then all servers
serve by turns of two seconds (phases `steady`, several rounds), each paused with its requests in
flight while the others run: a slow spell of the machine meets all of them alike. With --shift the
load of every round is of another kind, and each balancer follows while it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
from machine import machine
from numpy.typing import NDArray
from rich.console import Console
from serving_load import ClosedLoop, Load, StreamFailed, measure
from serving_model import ModelShape, ensure_model
from serving_prediction import predicted_ratios
from serving_report import BALANCERS, Moves, Phase, Results, show
from serving_servers import Clock, Engine, Server, ServerFailed, variants

from ep_rebalance.placement import Placement, imbalance_L

SERVER_BYTES = 3 << 30
"""Memory that a server takes: two ranks, each with two processes, and the API server."""

BUSY = 0.5
"""Load average from which the machine is not quiet."""

DEFAULT_SERVERS = ("observe", "rebalance", "even", "eplb")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repetitions", type=int, default=2, help="fresh starts of the balancers (default 2)")
    add("--rounds", type=int, default=5, help="measured rounds per repetition (default 5)")
    add("--seconds", type=float, default=10, help="of a server in a round (default 10)")
    add("--turn-seconds", type=float, default=2, help="of a server at a stretch (default 2)")
    add("--ramp-seconds", type=float, default=8, help="of a server before the first (default 8)")
    add(
        "--moving-seconds",
        type=float,
        default=40,
        help="load of each kind after a start (default 40)",
    )
    add(
        "--drift",
        type=int,
        default=2,
        help="kinds of load with other hot experts before (default 2)",
    )
    add(
        "--shift",
        action="store_true",
        help="measure each round with another of these kinds of load, not all with the last",
    )
    add("--interval-steps", type=int, default=64, help="steps between two plans (default 64)")
    add("--redundant", type=int, default=0, help="slots beyond one per expert (default 0)")
    add(
        "--servers",
        default=",".join(DEFAULT_SERVERS),
        help="which ones, by comma (default %(default)s)",
    )
    add(
        "--predict",
        action="store_true",
        help="record the contiguous server's load, other kinds first, and tell what its replay predicts",
    )
    add("--overhead", action="store_true", help="only measure what counting costs")
    add("--concurrency", type=int, default=64, help="requests in flight per rank (default 64)")
    add("--port", type=int, default=8300, help="first of as many ports as servers (default 8300)")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--output", type=Path, help="write everything measured to this JSON file")
    add("--quick", action="store_true", help="one repetition of short phases, to see that all runs")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.rounds = 1, 1
        options.moving_seconds, options.ramp_seconds = 20, 4
        options.drift = 0
    if options.overhead:
        options.servers = "turns"
    return options


@dataclass(frozen=True, slots=True)
class Look:
    """What a server said: what `imbalance_between` takes, and its steps since it was asked before.
    asked, answered: its time (`Server.now`)."""

    load: Any
    steps: list[tuple[float, float, bool]]
    asked: float
    answered: float


@contextlib.contextmanager
def _explained(server: Server) -> Iterator[None]:
    """What a client sees of a server's failure, with the end of the server's log."""
    try:
        yield
    except (aiohttp.ClientError, httpx.HTTPError, StreamFailed) as error:
        raise ServerFailed(f"{server.variant.title}: {error!r}\n{server.log_tail()}") from error


class Comparison:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace, folder: Path, console: Console) -> None:
        self._options = options
        self._console = console
        self._began = time.monotonic()
        self._shape = ModelShape()
        skewed, even = ensure_model(self._shape), ensure_model(self._shape.even())
        self._clock = Clock(
            interval_steps=options.interval_steps,
            redundant=options.redundant,
            trace=folder if options.predict else None,
        )
        available = variants(skewed, even, self._clock)
        names = options.servers.split(",")
        self._servers = {
            name: Server(available[name], Engine(), port=options.port + index, folder=folder)
            for index, name in enumerate(names)
        }
        self.titles = {name: available[name].title for name in names}
        self.results = Results(machine(), {key: str(value) for key, value in vars(options).items()})
        needed, free = len(names) * SERVER_BYTES, psutil.virtual_memory().available
        if needed > free:
            raise SystemExit(
                f"{len(names)} servers need {needed >> 30} GiB of memory and {free >> 30} GiB are "
                "free; compare fewer of them: --servers rebalance,eplb"
            )
        if (busy := os.getloadavg()[0]) > BUSY:
            self._say(
                f"The load average is {busy:.1f}: what else runs here will disturb the figures."
            )

    async def run(self) -> None:
        """Measure everything; all servers are stopped afterwards, whatever happens."""
        try:
            for repetition in range(self._options.repetitions):
                await self._repeat(repetition)
        finally:
            for server in self._servers.values():
                server.begin_stop()
            for server in self._servers.values():
                server.stop()

    def predict(self) -> None:
        """Tell what a replay of the contiguous server's trace says, beside what was measured."""
        assert self._clock.trace is not None
        ratios, waiting = predicted_ratios(self._clock.trace, self._clock.plugin_config())
        self._console.print(
            f"A replay of the contiguous server's load predicts {ratios['ours']:.3f} times its tokens per "
            f"second for ep_rebalance, and {ratios['hindsight']:.3f} for one that knew the future: "
            f"{waiting.text} of a step waits for experts.",
            soft_wrap=True,
        )

    def kill(self) -> None:
        """End what still runs, without a delay."""
        for server in self._servers.values():
            server.kill()

    async def _repeat(self, repetition: int) -> None:
        for name, server in self._servers.items():
            if name in BALANCERS:
                server.stop()
            await self._ensure(server, repetition)
            server.pause()
        async with contextlib.AsyncExitStack() as stack:
            loops = {
                name: await stack.enter_async_context(self._loop(server, repetition))
                for name, server in self._servers.items()
            }
            await self._turns(loops, self._options.ramp_seconds)
            await self._rounds(loops, repetition)
            for name, loop in loops.items():
                with self._running(name) as server:
                    await loop.finish()
                    if name in BALANCERS:
                        self.results.moves.append(await self._moves(server, repetition))

    async def _ensure(self, server: Server, repetition: int) -> None:
        """Start the server unless it runs; a balancer first serves for a while."""
        if server.started:
            return
        self._say(f"{server.variant.title}: starting")
        await server.start()
        if server.variant.name in BALANCERS or self._options.predict:
            await self._measure_moving(server, repetition)

    @contextlib.contextmanager
    def _running(self, name: str) -> Iterator[Server]:
        server = self._servers[name]
        server.resume()
        yield server
        server.pause()

    def _loop(
        self, server: Server, repetition: int, *, domain: int = 0, more_seed: int = 0
    ) -> ClosedLoop:
        load = self._load(repetition, domain=domain, more_seed=more_seed)
        return ClosedLoop(server.url, str(server.variant.model), load, server.now)

    def _load(self, repetition: int, *, domain: int, more_seed: int) -> Load:
        return Load(
            tokens=self._shape.token_ids(domain),
            concurrency=self._options.concurrency,
            seed=self._options.seed + 1000 * repetition + more_seed,
        )

    async def _turns(self, loops: Mapping[str, ClosedLoop], seconds: float) -> None:
        """Let every server run for that long in all, one after the other, in alternating order."""
        turns = max(1, round(seconds / self._options.turn_seconds))
        for turn in range(turns):
            for name in loops if turn % 2 == 0 else reversed(list(loops)):
                with self._running(name), _explained(self._servers[name]):
                    await loops[name].run(seconds / turns)

    async def _rounds(self, loops: Mapping[str, ClosedLoop], repetition: int) -> None:
        seen = {name: await self._look(name) for name in loops}
        for number in range(self._options.rounds):
            if self._options.shift:
                domain = (number + 1) % (self._options.drift + 1)
                for loop in loops.values():
                    loop.shift(self._load(repetition, domain=domain, more_seed=100 + number))
            await self._turns(loops, self._options.seconds)
            for name, loop in loops.items():
                look = await self._look(name)
                phase = self._phase(name, "steady", repetition, number, loop, seen[name], look)
                self._tell(phase, f"round {number + 1} of {self._options.rounds}")
                seen[name] = look

    async def _measure_moving(self, server: Server, repetition: int) -> None:
        """Serve other kinds of text first, then the one that is measured."""
        name = server.variant.name
        for number, domain in enumerate([*range(1, self._options.drift + 1), 0]):
            loop = self._loop(server, repetition, domain=domain, more_seed=500 + number)
            async with loop:
                before = await self._look(name)
                with _explained(server):
                    await loop.run(self._options.moving_seconds)
                after = await self._look(name)
                with _explained(server):
                    await loop.finish()
            phase = self._phase(name, "moving", repetition, number, loop, before, after)
            self._tell(phase, f"{sum(phase.carried)} steps moved experts")

    async def _look(self, name: str) -> Look:
        """Ask a server, paused or not."""
        server = self._servers[name]
        paused, asked = server.paused, server.now()
        server.resume()
        with _explained(server):
            if name == "eplb":
                load = await server.call("vllm_eplb_rearrangements")
            else:
                load = await server.report("load")
            steps = await server.call("ep_rebalance_step_times")
        if paused:
            server.pause()
        return Look(load, steps, asked, server.now())

    def _phase(
        self,
        name: str,
        kind: str,
        repetition: int,
        number: int,
        loop: ClosedLoop,
        before: Look,
        after: Look,
    ) -> Phase:
        steps = [
            (ended - began, carried)
            for began, ended, carried in after.steps
            if ended - began < self._options.turn_seconds
        ]
        phase = Phase(
            variant=name,
            kind=kind,
            repetition=repetition,
            round=number,
            measurement=measure(loop.answers, before.answered, after.asked),
            step_seconds=[seconds for seconds, _ in steps],
            carried=[carried for _, carried in steps],
            imbalance=imbalance_between(before.load, after.load),
        )
        self.results.phases.append(phase)
        return phase

    async def _moves(self, server: Server, repetition: int) -> Moves:
        name = server.variant.name
        if name == "eplb":
            done = await server.call("vllm_eplb_rearrangements")
            return Moves(
                variant=name,
                repetition=repetition,
                migrations=len(done),
                experts=sum(entry["moved"] for entry in done),
                bytes=sum(entry["fetched"] for entry in done) * self._shape.expert_bytes,
            )
        status = await server.report("status")
        sent = status["migrated_bytes"]
        return Moves(
            variant=name,
            repetition=repetition,
            migrations=status["plans"]["committed"],
            experts=sum(status["migrated_experts"].values()),
            bytes=sent["intranode"] + sent["internode"],
        )

    def _tell(self, phase: Phase, more: str) -> None:
        steps = phase.step_seconds or [float("nan")]
        imbalance = "" if phase.imbalance is None else f", imbalance {phase.imbalance:.2f}"
        self._say(
            f"{self.titles[phase.variant]}, {phase.kind}, repetition {phase.repetition + 1} of "
            f"{self._options.repetitions}, {more}: {phase.measurement.tokens_per_second:.0f} tokens/s, "
            f"{len(steps)} steps of {1e3 * np.median(steps):.0f} ms{imbalance}"
        )

    def _say(self, text: str) -> None:
        elapsed = int(time.monotonic() - self._began)
        self._console.print(
            f"[dim]{elapsed // 60:3d}:{elapsed % 60:02d}[/]  {text}",
            highlight=False,
            soft_wrap=True,
        )


def imbalance_between(before: Any, after: Any) -> float | None:
    """Max/mean rank load of what was served between two answers of `GET /ep_rebalance/load` on the
    placement of the second, mean of the layers; for vLLM's balancer, of the windows that it looked at
    in that time. None if there is nothing to tell."""
    if isinstance(after, list):
        seen = [np.mean(entry["before"]) for entry in after[len(before) :]]
        return float(np.mean(seen)) if seen else None
    tokens_LE = total_tokens_LE(after) - total_tokens_LE(before)
    slots_LP = np.array([layer["slots"] for layer in after["layers"]], dtype=np.int32)
    placement = Placement(slots_LP, tokens_LE.shape[1], after["ep_size"])
    quotas_LP = np.array([layer["quotas"] for layer in after["layers"]])
    return float(np.mean(imbalance_L(placement.rank_load_LR(tokens_LE, quotas_LP))))


def total_tokens_LE(load: dict[str, Any]) -> NDArray[np.int64]:
    return np.array([np.sum(list(layer["tokens"].values()), axis=0) for layer in load["layers"]])


async def _run(comparison: Comparison) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await comparison.run()


def main() -> None:
    """Measure, print, and write the results."""
    options, console = parse_options(), Console()
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-serving-"))
    comparison = Comparison(options, folder, console)
    try:
        asyncio.run(_run(comparison))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Stopped, and so are the servers.")
        raise SystemExit(130) from None
    except BaseException as error:
        console.print(f"Failed; the servers' logs are in {folder}", style="red")
        if isinstance(error, ServerFailed):
            console.print(str(error), highlight=False, markup=False)
            raise SystemExit(1) from None
        raise
    finally:
        comparison.kill()
    show(comparison.results, comparison.titles, console)
    if options.predict:
        comparison.predict()
    if options.output:
        options.output.write_text(json.dumps(comparison.results.as_dict()))
        console.print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
