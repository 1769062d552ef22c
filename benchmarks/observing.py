"""What it costs a server to be watched: a scrape every second and an open page, against neither.

One server with steady load serves by turns: in every second one nobody looks, in the others `/metrics`
is scraped once a second and the page's `overview` is asked for every two seconds, as an open page does.
Neighbouring turns are compared, in alternating order. Few requests are in flight, so that they come in
short waves. The browser itself is left out: it runs on the viewer's machine.
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
from serving_load import ClosedLoop, Load, measure
from serving_model import ModelShape, ensure_model
from serving_servers import Clock, Engine, Server, variants

SCRAPE_SECONDS = 1.0
PAGE_SECONDS = 2.0
ASKED = {"scrape": ("/metrics", SCRAPE_SECONDS), "page": ("/ep_rebalance/overview", PAGE_SECONDS)}
RAMP_SECONDS = 15.0


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
    add("--concurrency", type=int, default=8, help="requests in flight per rank (default 8)")
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
    """When it began and ended; what was served is known when all requests have ended."""
    async with aiohttp.ClientSession(server.url) as session:
        looking = [asyncio.create_task(ask_every(session, *ASKED[name])) for name in asked]
        began = server.now()
        await loop.run(seconds)
        ended = server.now()
        for task in looking:
            assert not task.done(), f"the server did not answer: {task.exception()}"
            task.cancel()
    return began, ended


def rate(loop: ClosedLoop, times: tuple[float, float]) -> float:
    """Tokens per second between two moments."""
    return measure(loop.answers, *times).tokens_per_second


async def compare(
    options: argparse.Namespace, folder: Path, console: Console
) -> list[tuple[float, float]]:
    """(quiet, watched) tokens per second of each pair of turns."""
    shape = ModelShape()
    asked = tuple(ASKED) if options.watch == "both" else (options.watch,)
    variant = variants(ensure_model(shape), ensure_model(shape.even()), Clock())["rebalance"]
    server = Server(variant, Engine(), port=options.port, folder=folder)
    console.print("starting the server")
    await server.start()
    try:
        load = Load(tokens=shape.token_ids(0), concurrency=options.concurrency)
        turns: list[dict[bool, tuple[float, float]]] = []
        async with ClosedLoop(server.url, str(variant.model), load, server.now) as loop:
            await loop.run(RAMP_SECONDS)
            for number in track(range(options.pairs), "pairs of turns", console=console):
                turns.append({})
                for watched in (False, True) if number % 2 else (True, False):
                    turns[-1][watched] = await turn(
                        server, loop, options.seconds, asked if watched else ()
                    )
            await loop.finish()
        return [
            (rate(loop, quiet_and_watched[False]), rate(loop, quiet_and_watched[True]))
            for quiet_and_watched in turns
        ]
    finally:
        server.stop()


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console()
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-observing-"))
    quiet, watched = np.array(asyncio.run(compare(options, folder, console))).T
    ratio = watched / quiet
    low, high = np.percentile(ratio, [10, 90])
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    console.print(
        f"quiet {np.median(quiet):.0f} tokens/s, watched {np.median(watched):.0f}; ratio of neighbouring "
        f"turns: median {np.median(ratio):.4f}, mean {ratio.mean():.4f} (standard error {error:.4f}), "
        f"{low:.3f} to {high:.3f} in the middle 80 % of {len(ratio)} pairs",
        highlight=False,
    )
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")


if __name__ == "__main__":
    main()
