"""What it costs a server to be watched: a scrape every second and an open page, against neither.

One server under full load serves by turns: in every second one nobody looks, in the others `/metrics`
is scraped once a second and the page's `overview` is asked for every two seconds, as an open page does.
Neighbouring turns are compared, in alternating order, by engine steps per second: all steps are full,
so these are tokens per second. The browser itself is left out: it runs on the viewer's machine.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import numpy as np
from machine import machine
from rich.console import Console
from rich.progress import track
from serving_load import ClosedLoop, Load
from serving_model import ModelShape, ensure_model
from serving_servers import Clock, Engine, Server, variants

SCRAPE_SECONDS = 1.0
PAGE_SECONDS = 2.0
ASKED = {"scrape": ("/metrics", SCRAPE_SECONDS), "page": ("/ep_rebalance/overview", PAGE_SECONDS)}
RAMP_SECONDS = 20.0
STALL_SECONDS = 1.0
"""A step that takes longer was held up by the machine, and its pair of turns is left out."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--watch", choices=("both", *ASKED), default="both", help="what is asked for (default both)"
    )
    add("--pairs", type=int, default=120, help="of turns (default 120)")
    add("--seconds", type=float, default=2, help="of a turn (default 2)")
    add("--port", type=int, default=8300, help="of the server (default 8300)")
    add("--concurrency", type=int, default=64, help="requests in flight per rank (default 64)")
    return parser.parse_args()


async def ask_every(session: aiohttp.ClientSession, path: str, seconds: float) -> None:
    """Until it is cancelled."""
    while True:
        began = time.monotonic()
        async with session.get(path) as answer:
            answer.raise_for_status()
            await answer.read()
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))


async def turn(
    server: Server, loop: ClosedLoop, seconds: float, asked: Sequence[str]
) -> tuple[float, float]:
    """When it began and ended, by the clock of the server's steps."""
    async with aiohttp.ClientSession(server.url) as session:
        began = time.perf_counter()
        looking = [asyncio.create_task(ask_every(session, *ASKED[name])) for name in asked]
        await loop.run(seconds)
        ended = time.perf_counter()
        for task in looking:
            assert not task.done(), f"the server did not answer: {task.exception()}"
            task.cancel()
    return began, ended


async def measure(
    options: argparse.Namespace, folder: Path, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """(moments at which steps ended; when the turns of each pair [quiet, watched] began and ended)."""
    shape = ModelShape()
    asked = tuple(ASKED) if options.watch == "both" else (options.watch,)
    variant = variants(ensure_model(shape), ensure_model(shape.even()), Clock())["rebalance"]
    server = Server(variant, Engine(), port=options.port, folder=folder)
    console.print("starting the server")
    await server.start()
    try:
        load = Load(tokens=shape.token_ids(0), concurrency=options.concurrency)
        turns = np.empty((options.pairs, 2, 2))
        async with ClosedLoop(server.url, str(variant.model), load, server.now) as loop:
            await loop.run(RAMP_SECONDS)
            for number in track(range(options.pairs), "pairs of turns", console=console):
                for watched in (False, True) if number % 2 else (True, False):
                    turns[number, int(watched)] = await turn(
                        server, loop, options.seconds, asked if watched else ()
                    )
            steps = await server.call("ep_rebalance_step_times")
        return np.array([ended for _, ended, _ in steps]), turns
    finally:
        server.stop()


def steps_per_second(ended: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """[pairs, 2]: a step that a turn only holds in part counts in part. Pairs that hold a stall are
    left out.
    """
    done = np.interp(turns, ended, np.arange(len(ended)))
    stalled = np.diff(ended, prepend=ended[0]) > STALL_SECONDS
    stalls = np.interp(turns, ended, np.cumsum(stalled))
    whole = (np.diff(stalls, axis=-1) == 0).all(axis=(1, 2))
    rate: np.ndarray = (np.diff(done, axis=-1) / np.diff(turns, axis=-1))[whole, :, 0]
    return rate


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console()
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-observing-"))
    rate = steps_per_second(*asyncio.run(measure(options, folder, console)))
    quiet, watched = rate.T
    ratio = watched / quiet
    low, high = np.percentile(ratio, [10, 90])
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    tokens = 2 * Engine().step_tokens
    console.print(
        f"quiet {tokens * np.median(quiet):.0f} tokens/s, watched {tokens * np.median(watched):.0f}; "
        f"ratio of neighbouring turns: median {np.median(ratio):.4f}, mean {ratio.mean():.4f} "
        f"(standard error {error:.4f}), {low:.3f} to {high:.3f} in the middle 80 % of {len(ratio)} "
        f"pairs of {options.pairs}",
        highlight=False,
    )
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")


if __name__ == "__main__":
    main()
