"""What is learned of the experts' part of a step, beside what is true, in a real server on CPU.

One server after the other, each with two data-parallel ranks that are two expert-parallel ranks (as in
serving.py), serves prompts of kinds that have other hot experts:

  learning   the plugin moves experts and learns, while the kind changes every `--spell-seconds`
  changing   the plugin only counts, on the placement that the engine loads; by turns it is sent the kind that
             loads rank 0 most, and one that loads both ranks more alike

What waits is what steps take longer by when only the kind changes: (difference of their seconds) /
(difference of the busiest ranks' tokens), from neighbouring turns of the second server. It is a
difference of means that shares no code with what is learned, and nothing is fitted. It is compared at
the load of the second server: slope times the busiest ranks' tokens over the step's seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from rich.console import Console
from serving_load import ClosedLoop, Load
from serving_model import ModelShape, ensure_model
from serving_servers import Engine, Server, Variant

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot
from ep_rebalance.offline.scenarios import open_traces
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.expert_time import ExpertTime, ExpertTimeEstimate
from ep_rebalance.planning.step_work import StepWork, mean_work, step_work

SNAPSHOT_STEPS = 8
"""As in serving.py; a plan is made after eight of them."""

BUSIEST, OTHERS = 0, (1, 2, 3)
"""Kinds of prompts: the first has its hot experts on rank 0, the others have them anywhere."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--spells", type=int, default=8, help="of one kind, while it learns (default 8)")
    add("--spell-seconds", type=float, default=12, help="(default 12)")
    add("--turns", type=int, default=16, help="of one kind, of the other server (default 16)")
    add("--turn-seconds", type=float, default=6, help="(default 6)")
    add("--concurrency", type=int, default=16, help="requests in flight per rank (default 16)")
    add("--port", type=int, default=8320, help="(default 8320)")
    add("--output", type=Path, help="write what was measured to this JSON file")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One kind of prompts for a while.

    began, ended: Unix times between which all requests in flight were of that kind.
    """

    kind: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A number and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


async def serve(
    server: Server,
    options: argparse.Namespace,
    shape: ModelShape,
    kinds: Sequence[int],
    seconds: float,
) -> tuple[list[Turn], dict[str, Any]]:
    """(turns, status at the end) of a server that is sent one kind after the other."""
    turns = []
    await server.start()
    try:
        first = _load(shape, options, kinds[0], 0)
        async with ClosedLoop(server.url, str(server.variant.model), first, server.now) as loop:
            await loop.run(5.0)  # the first steps compile and allocate
            for number, kind in enumerate(kinds):
                loop.shift(_load(shape, options, kind, number))
                # Requests that were sent before are of the kind before; in a third of a turn they are done.
                await loop.run(seconds / 3)
                began = time.time()
                await loop.run(seconds * 2 / 3)
                turns.append(Turn(kind=kind, began=began, ended=time.time()))
            status = await server.report("status")
            await loop.finish()
    finally:
        server.stop()
    return turns, status


def _load(shape: ModelShape, options: argparse.Namespace, kind: int, seed: int) -> Load:
    return Load(tokens=shape.token_ids(kind), concurrency=options.concurrency, seed=seed)


def recorded_works(
    folder: Path, follow: Callable[[RecordedSnapshot, RecordedPlacement], None]
) -> list[tuple[float, StepWork]]:
    """(Unix time, work) of each snapshot in a trace without redundant experts.

    follow: called with each snapshot and what it was served with.
    """
    seen: list[tuple[float, StepWork]] = []
    served: RecordedPlacement | None = None
    for reader in open_traces([folder]):
        for record in reader:
            if isinstance(record, RecordedPlacement):
                served = record
                continue
            assert served is not None
            follow(record, served)
            sample = record.sample(served.placement, served.quotas_LP)
            work = step_work(sample, TokenCost(), by_own_counts=False)
            if work is not None:
                seen.append((record.time, work))
    return seen


def true_fraction(
    works: Sequence[tuple[float, StepWork]], turns: Sequence[Turn]
) -> tuple[Told, StepWork]:
    """(the fraction that waits, the mean step at which it does), by neighbouring turns of the two kinds."""
    means = [
        mean_work(within)
        for turn in turns
        if (within := [work for when, work in works if turn.began + 0.5 < when < turn.ended])
    ]
    usual = mean_work(means)
    busy, other = means[::2], means[1::2]
    longer, more = [], []
    for before, between, after in zip(busy, other, busy[1:], strict=False):
        # Between two turns of the busy kind, so that what drifts cancels. Steps of more tokens take longer
        # anyway: what is compared is for the same tokens of the mean rank.
        pair = mean_work([before, after])
        tokens = pair.mean_A.sum() / between.mean_A.sum()
        longer.append(pair.seconds - between.seconds * tokens)
        more.append(pair.busiest_A.sum() - between.busiest_A.sum() * tokens)
    slope = np.sum(longer) / np.sum(more)
    spread = np.array(longer) - slope * np.array(more)
    error = float(np.sqrt(np.sum(spread**2) * len(spread) / (len(spread) - 1)) / abs(np.sum(more)))
    at = usual.busiest_A.sum() / usual.seconds
    return Told(value=float(slope * at), error=error * at), usual


def learned_from(folder: Path, usual: StepWork) -> tuple[ExpertTime, ExpertTime]:
    """What a server's trace tells: (as the server knew it in the end, at the load of `usual`)."""
    asked = ExpertTimeEstimate("auto", cost=TokenCost(), phases=("prefill", "decode"))
    samples = []

    def follow(record: RecordedSnapshot, served: RecordedPlacement) -> None:
        samples.append(record.sample(served.placement, served.quotas_LP))

    recorded_works(folder, follow)
    asked.add(samples)
    return asked.at(asked.latest), asked.at(usual)


def server_of(
    name: str, config: dict[str, Any], model: Path, options: argparse.Namespace, folder: Path
) -> Server:
    """A server whose load is recorded below `folder`."""
    (folder / name).mkdir()
    traced = {**config, "trace": {"path": str(folder / name)}}
    settings = load_config(traced, {"window": {"snapshot_steps": SNAPSHOT_STEPS}}).as_dict()
    chosen = {key: settings[key] for key in ("mode", "window", "trace")}
    variant = Variant(
        name=name,
        title=name,
        model=model,
        arguments=("--plugin", "ep_rebalance", "--ep-rebalance-config", json.dumps(chosen)),
    )
    return Server(variant, Engine(), port=options.port, folder=folder)


async def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Serve with both servers, and compare."""
    shape = ModelShape()
    model = ensure_model(shape)
    learning = server_of("learning", {"mode": "rebalance"}, model, options, folder)
    changing = server_of("changing", {"mode": "observe"}, model, options, folder)
    kinds = [number % len((BUSIEST, *OTHERS)) for number in range(options.spells)]
    console.print("The server that learns is starting.")
    _, status = await serve(learning, options, shape, kinds, options.spell_seconds)
    console.print("The server whose load changes is starting.")
    by_turns = [BUSIEST if number % 2 == 0 else OTHERS[0] for number in range(options.turns)]
    turns, _ = await serve(changing, options, shape, by_turns, options.turn_seconds)
    works = recorded_works(folder / "changing", lambda record, served: None)
    truth, usual = true_fraction(works, turns)
    at_end, at_usual = learned_from(folder / "learning", usual)
    own, _ = learned_from(folder / "changing", usual)
    return {
        "machine": machine(),
        "status": {
            key: status[key] for key in ("expert_time", "expert_time_learned", "plans", "commits")
        },
        "true": truth,
        "learned": at_usual,
        "learned_at_its_own_load": at_end,
        "learned_from_the_changing_server": own,
        "step_seconds": usual.seconds,
        "imbalance": float(usual.busiest_A.sum() / usual.mean_A.sum()),
    }


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console()
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-expert-time-"))
    result = asyncio.run(measure(options, folder, console))
    for name, value in result.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    console.print(f"The traces are in {folder}.")
    if options.output:
        options.output.write_text(json.dumps(result, default=vars))


if __name__ == "__main__":
    main()
