"""Does a server grow? Three servers serve a load that shifts, in turns, for as long as asked.

vLLM alone, with the plugin in mode observe, and with the plugin that rebalances, all on two tensor-parallel
ranks; alone it has no expert parallelism, which vLLM's own experts for CPUs do not have. In each turn one
of them serves and the others stand still. Then rank 0's worker says what it holds: memory that is its own
(USS), what malloc gave out, Python objects, blocks of numba's runtime, threads and descriptors. A fixed set
of questions is asked in every turn; every answer must stay what it was. Ctrl-C or SIGTERM ends it early, with
what was seen until then.

Growth is the slope over the second half of the turns (Theil-Sen: the median of the slopes of all pairs) per
hour of serving, with the 95 % interval of a bootstrap over the turns. The verdict says of each kind of memory
by how much the plugin's servers grow faster than the one before them, and whether that differs from nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import vllm_eplb_on_cpu
from machine import machine
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving_load import ClosedLoop, Load
from serving_model import ModelShape, ensure_model
from serving_servers import Clock, Engine, Server, Variant, variants

MEMORY = "vllm_eplb_on_cpu.memory.WorkerExtension"
NUMBA_COUNTS = {"NUMBA_NRT_STATS": "1"}
"""Without it numba's runtime does not count its blocks."""
HOUR = 3600.0
QUESTIONS = 8
BOOTSTRAPS = 1000
FEWEST_TURNS = 4
MEGABYTES = 1e6
SHOWN = {
    "uss": ("USS", "MB", MEGABYTES),
    "heap": ("malloc in use", "MB", MEGABYTES),
    "objects": ("Python objects", "", 1.0),
    "numba": ("numba blocks", "", 1.0),
    "native_threads": ("threads", "", 1.0),
    "descriptors": ("descriptors", "", 1.0),
}


@dataclass(slots=True)
class Soaked:
    """A server, and what was seen of it at the end of each turn.

    hours: that it had served. steps: seconds of one, median of the turn. held: of rank 0's worker.
    """

    server: Server
    load: Load
    hours: list[float] = field(default_factory=list)
    migrations: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    held: list[dict[str, int]] = field(default_factory=list)
    answers: list[list[list[int]]] = field(default_factory=list)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=60,
        help="of turns, all servers together; questions come on top, two thirds as much (default 60)",
    )
    add("--turn", type=float, default=20, help="seconds of a turn (default 20)")
    add("--port", type=int, default=8400, help="of the first server (default 8400)")
    add("--concurrency", type=int, default=16, help="requests in flight per rank (default 16)")
    add("--output", type=Path, help="a JSON file for everything that was seen")
    return parser.parse_args()


def soaked_variants(shape: ModelShape) -> dict[str, Variant]:
    """The servers that are compared, by name."""
    known = variants(ensure_model(shape), ensure_model(shape.even()), Clock(interval_steps=32))
    alone = Variant(
        name="alone",
        title="vLLM alone",
        model=known["observe"].model,
        arguments=("--worker-extension-cls", MEMORY),
        environment=NUMBA_COUNTS,
    )
    memory = {vllm_eplb_on_cpu.SWITCH: vllm_eplb_on_cpu.MEMORY, **NUMBA_COUNTS}
    with_memory = [replace(known[name], environment=memory) for name in ("observe", "rebalance")]
    return {variant.name: variant for variant in (alone, *with_memory)}


async def serve_turn(soaked: Soaked, loop: ClosedLoop, seconds: float) -> None:
    """Let one server serve; then ask what it holds."""
    server = soaked.server
    server.resume()
    await loop.run(seconds)
    answers = await ask_questions(server, soaked.load)
    held = await server.call("ep_benchmark_memory")
    with_plugin = server.variant.name != "alone"
    status = await server.report("status") if with_plugin else {}
    times = await server.call("ep_rebalance_step_times") if with_plugin else []
    soaked.answers.append(answers)
    soaked.held.append(held)
    soaked.migrations.append(status["plans"]["committed"] if status else 0)
    soaked.steps.append(
        float(np.median([end - began for began, end, _ in times])) if times else 0.0
    )
    soaked.hours.append(server.now() / HOUR)
    server.pause()


async def ask_questions(server: Server, load: Load) -> list[list[int]]:
    """Answers to the fixed questions, one after the other."""
    answers = []
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        for number in range(QUESTIONS):
            body = {**load.request(10**6 + number), "stream": False, "return_token_ids": True}
            answer = await client.post(
                "/v1/completions", json=body | {"model": str(server.variant.model)}
            )
            answer.raise_for_status()
            answers.append(answer.json()["choices"][0]["token_ids"])
    return answers


async def soak(options: argparse.Namespace, folder: Path, console: Console) -> list[Soaked]:
    """Serve in turns until the time is over."""
    task = asyncio.current_task()
    assert task is not None
    # A shell's background job would ignore the first of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    shape = ModelShape()
    soaked: list[Soaked] = []
    loads = [
        Load(tokens=shape.token_ids(d), ranks=1, concurrency=options.concurrency)
        for d in range(shape.domains)
    ]
    loops: list[ClosedLoop] = []
    try:
        for place, variant in enumerate(soaked_variants(shape).values()):
            engine = Engine(parallelism="tensor", expert_parallel=variant.name != "alone")
            server = Server(variant, engine, port=options.port + place, folder=folder)
            console.print(f"starting {variant.title}")
            await server.start()
            soaked.append(Soaked(server, loads[0]))
            server.pause()
        for one in soaked:
            one.server.resume()
            loops.append(
                ClosedLoop(one.server.url, str(one.server.variant.model), loads[0], one.server.now)
            )
            await loops[-1].__aenter__()
            one.server.pause()
        rounds = max(FEWEST_TURNS, round(60 * options.minutes / options.turn / len(soaked)))
        with Progress(console=console) as progress:
            turns = progress.add_task("turns", total=rounds * len(soaked))
            for turn in range(rounds):
                for one, loop in zip(soaked, loops, strict=True):
                    loop.shift(loads[turn % len(loads)])
                    await serve_turn(one, loop, options.turn)
                    progress.advance(turns)
    except asyncio.CancelledError:  # by a signal
        if min((len(one.hours) for one in soaked), default=0) < FEWEST_TURNS:
            raise
        console.print("interrupted: this is what was seen until now")
    finally:
        for one, loop in zip(soaked, loops, strict=False):
            one.server.resume()
            await loop.__aexit__()
        for one in soaked:
            one.server.stop()
    return soaked


@dataclass(frozen=True, slots=True)
class Growth:
    """Per hour. slope: the median of the slopes of all pairs. resampled_B: the same of each resampling."""

    slope: float
    resampled_B: NDArray[np.float64]

    @classmethod
    def of(
        cls, x_N: NDArray[np.float64], y_N: NDArray[np.float64], rng: np.random.Generator
    ) -> Growth:
        picks = _resampled(len(x_N), rng)
        return cls(
            _theil_sen(x_N, y_N), np.array([_theil_sen(x_N[pick], y_N[pick]) for pick in picks])
        )

    def __sub__(self, other: Growth) -> Growth:
        return Growth(self.slope - other.slope, self.resampled_B - other.resampled_B)

    @property
    def interval(self) -> tuple[float, float]:
        """That holds 95 % of the resamplings."""
        least, most = np.nanpercentile(self.resampled_B, (2.5, 97.5))
        return float(least), float(most)

    def text(self, unit: str) -> str:
        least, most = self.interval
        return f"{self.slope:.3g} {unit} ({least:.3g} to {most:.3g})"


def _resampled(size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    return [np.sort(rng.integers(0, size, size)) for _ in range(BOOTSTRAPS)]


def _theil_sen(x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> float:
    first, second = np.triu_indices(len(x_N), 1)
    apart = x_N[second] - x_N[first]
    some = apart > 0
    if not some.any():
        return float("nan")
    return float(np.median((y_N[second] - y_N[first])[some] / apart[some]))


def _steps(one: Soaked) -> str:
    """Of vLLM alone nothing times them."""
    if not any(one.steps):
        return ""
    first, second = np.array_split(1e3 * np.array(one.steps), 2)
    return (
        f", step {np.median(first):.1f} ms in the first half, {np.median(second):.1f} in the second"
    )


def _growths(one: Soaked, rng: np.random.Generator) -> dict[str, Growth]:
    """Of each kind of memory, over the second half of the turns."""
    half = slice(len(one.hours) // 2, None)
    x_N = np.array(one.hours[half])
    return {
        name: Growth.of(x_N, np.array([held[name] for held in one.held[half]]) / scale, rng)
        for name, (_, _, scale) in SHOWN.items()
    }


def _verdict(more: Growth, unit: str) -> str:
    least, _ = more.interval
    if least > 0:
        return f"grows by {more.text(unit)} an hour more"
    return f"no growth of its own: {more.text(unit)} an hour"


def report(soaked: Sequence[Soaked], console: Console) -> dict[str, Any]:
    """Print the table, and return all that was seen."""
    table = Table("", *(f"{title} per hour" for title, _, _ in SHOWN.values()), title="growth")
    growths = [_growths(one, np.random.default_rng(0)) for one in soaked]
    for one, growth in zip(soaked, growths, strict=True):
        cells = [growth[name].text(unit) for name, (_, unit, _) in SHOWN.items()]
        table.add_row(one.server.variant.title, *cells)
    console.print(table)
    for (before, slower), (after, faster) in pairwise(zip(soaked, growths, strict=True)):
        titles = f"{after.server.variant.title} against {before.server.variant.title}"
        for name, (title, unit, _) in SHOWN.items():
            console.print(f"{titles}, {title}: {_verdict(faster[name] - slower[name], unit)}")
    for one in soaked:
        same = all(answers == one.answers[0] for answers in one.answers)
        console.print(
            f"{one.server.variant.title}: {one.hours[-1] * 60:.1f} minutes, {one.migrations[-1]} migrations, "
            f"{len(one.answers)} x {QUESTIONS} answers {'all equal' if same else 'NOT ALL EQUAL'}, USS "
            f"{one.held[0]['uss'] / MEGABYTES:.0f} to {one.held[-1]['uss'] / MEGABYTES:.0f} MB{_steps(one)}"
        )
    return {
        one.server.variant.name: {
            "hours": one.hours, "migrations": one.migrations, "steps": one.steps, "held": one.held,
        }
        for one in soaked
    }  # fmt: skip


def main() -> None:
    """Serve, measure and print."""
    options, console = parse_options(), Console()
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-soak-"))
    began = time.monotonic()
    try:
        soaked = asyncio.run(soak(options, folder, console))
    except asyncio.CancelledError:
        raise SystemExit(f"ended before every server had {FEWEST_TURNS} turns") from None
    seen: Mapping[str, Any] = report(soaked, console)
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    console.print(f"{(time.monotonic() - began) / 60:.0f} minutes in all; {described}")
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(), "servers": seen}))


if __name__ == "__main__":
    main()
