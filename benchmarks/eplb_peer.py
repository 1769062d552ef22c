"""Hold `replay --policy vllm-eplb` to vLLM's balancer while it serves.

A server with vLLM's own balancer, made to run on CPU (vllm_eplb_on_cpu), gets kinds of load with other
hot experts, one after another. It keeps what each step counted, and its maps. The counts become a trace,
with snapshots of 1 step, of 16, and of 17 as the plugin takes them: one step more for the all-reduce, so
that no window of the balancer is made of whole snapshots. Its replays are set beside what the server did:
after which steps it rearranged, how many experts it moved, how many of them over links, and into which map.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from serving_load import ClosedLoop, Load
from serving_model import ModelShape, ensure_model
from serving_servers import Clock, Engine, Server, variants
from vllm_eplb_on_cpu import STEPS_FOLDER

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceHead
from ep_rebalance.offline.balancing import PlanMade
from ep_rebalance.offline.run import replay
from ep_rebalance.offline.scenarios import scenario
from ep_rebalance.placement import Placement

SNAPSHOT_STEPS = (1, 16, 17)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """What the server did.

    counts_NLE: int64 [N, L, E], tokens of all ranks in each step.
    slots_NLP: int64 [N, L, P], the map after each step.
    alone: steps in which one rank had no tokens.
    rearrangements: rank 0's.
    """

    counts_NLE: NDArray[np.int64]
    slots_NLP: NDArray[np.int64]
    alone: int
    rearrangements: list[dict[str, Any]]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=60, help="of each kind of load (default 60)")
    add("--kinds", type=int, default=3, help="kinds of load (default 3)")
    add("--interval-steps", type=int, default=64, help="step_interval (default 64)")
    add("--window-steps", type=int, default=48, help="window_size (default 48)")
    add("--redundant", type=int, default=4, help="slots beyond one per expert (default 4)")
    add("--concurrency", type=int, default=32, help="requests in flight per rank (default 32)")
    add("--port", type=int, default=8390, help="of the server (default 8390)")
    add("--output", type=Path, help="write the comparison to this JSON file")
    return parser.parse_args()


async def serve(options: argparse.Namespace, shape: ModelShape, folder: Path) -> Served:
    """Let the server balance the load, and take what it kept."""
    model = ensure_model(shape)
    clock = Clock(
        interval_steps=options.interval_steps,
        window_steps=options.window_steps,
        redundant=options.redundant,
    )
    variant = variants(model, model, clock)["eplb"]
    kept = {**variant.environment, STEPS_FOLDER: str(folder)}
    variant = dataclasses.replace(variant, environment=kept)
    server = Server(variant, Engine(), port=options.port, folder=folder)
    try:
        await server.start()
        loads = [
            Load(
                tokens=shape.token_ids(domain % shape.domains),
                concurrency=options.concurrency,
                seed=domain,
            )
            for domain in range(options.kinds)
        ]
        async with ClosedLoop(server.url, str(model), loads[0], server.now) as loop:
            for load in loads:
                loop.shift(load)  # without a pause, in which ranks would stand idle by turns
                await loop.run(options.seconds)
            await loop.finish()
        rearrangements = await server.call("vllm_eplb_rearrangements")
        await server.call("vllm_eplb_steps")
    finally:
        server.stop()
    return joined([np.load(folder / f"rank{rank}.npz") for rank in range(2)], rearrangements)


def joined(ranks: Sequence[Any], rearrangements: list[dict[str, Any]]) -> Served:
    """The sum over ranks; the steps that all of them have."""
    steps = min(len(rank["dummy_N"]) for rank in ranks)
    dummy_RN = np.stack([rank["dummy_N"][:steps] for rank in ranks])
    maps = [rank["slots_NLP"][:steps] for rank in ranks]
    if not all(np.array_equal(maps[0], other) for other in maps):
        raise SystemExit("the ranks' maps differ: the server did not stay in step")
    return Served(
        counts_NLE=sum(rank["counts_NLE"][:steps] for rank in ranks),
        slots_NLP=maps[0],
        alone=int((dummy_RN.any(axis=0) & ~dummy_RN.all(axis=0)).sum()),
        rearrangements=rearrangements,
    )


def head_of(shape: ModelShape, redundant: int) -> TraceHead:
    """The head of a trace of the server."""
    return TraceHead(
        model="serving_model",
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        ep_size=2,
        slots=shape.experts + redundant,
        node_of_rank=[0, 0],
        expert_bytes=[shape.expert_bytes] * shape.layers,
        hidden_size=shape.hidden,
        engine="vllm",
        plugin_version="",
        started=0.0,
        config=load_config({"planner": {"redundant_experts": redundant}}).as_dict(),
        origin="vLLM's balancer",
    )


def records_of(
    served: Served, head: TraceHead, steps: int
) -> Iterator[RecordedPlacement | RecordedSnapshot]:
    """A trace with snapshots of so many steps."""
    loaded = Placement(served.slots_NLP[0], head.experts, head.ep_size)
    yield RecordedPlacement(
        placement=loaded, quotas_LP=loaded.even_quotas_LP(), generation=0, step=0, time=0.0
    )
    for first in range(0, len(served.counts_NLE), steps):
        counts_LE = served.counts_NLE[first : first + steps].sum(axis=0)
        covered = min(steps, len(served.counts_NLE) - first)
        yield RecordedSnapshot(
            counts_ALE=np.stack([counts_LE, np.zeros_like(counts_LE)]).astype(np.uint32),
            step=first + covered,
            steps=covered,
            step_seconds=0.0,
            time=float(first),
            generation=0,
        )


def plans_of(served: Served, head: TraceHead, steps: int, settings: dict[str, Any]) -> Any:
    """The rearrangements of a replay of that trace."""
    redundant = head.slots - head.experts
    config = load_config(head.config)
    chosen = scenario(head, config, "vllm-eplb", head.ep_size, redundant, eplb=settings)
    return replay(head, records_of(served, head, steps), chosen).plans


def compared(
    served: Served, head: TraceHead, replays: dict[int, tuple[PlanMade, ...]]
) -> list[dict[str, Any]]:
    """A row for each rearrangement of the server or of a replay."""
    live = {entry["step"]: entry for entry in served.rearrangements}
    plans = {size: {plan.step: plan for plan in made} for size, made in replays.items()}
    rows = []
    for step in sorted({*live, *(step for made in plans.values() for step in made)}):
        entry = live.get(step)
        row: dict[str, Any] = {
            "step": step,
            "live": entry and {"moved": entry["moved"], "fetched": entry["fetched"]},
        }
        for size, made in plans.items():
            plan = made.get(step)
            row[f"snapshots of {size}"] = plan and {
                "moved": plan.moved,
                "fetched": sum(n for link, n in plan.bytes.items() if link != "local")
                // head.expert_bytes[0],
                "same slots": float(np.mean(plan.placement.slots_LP == served.slots_NLP[step - 1])),
            }
        rows.append(row)
    return rows


def totals(rows: Sequence[dict[str, Any]], column: str) -> dict[str, float]:
    """Sums over all rearrangements of one column."""
    entries = [row[column] for row in rows if row[column]]
    names = ("moved", "fetched")
    return {"rearrangements": len(entries)} | {
        name: sum(entry[name] for entry in entries) for name in names
    }


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str], console: Console) -> None:
    """The comparison as a table."""
    table = Table(title="Experts moved (of these, between ranks)")
    table.add_column("after step", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["step"]), *(_cell(row[column]) for column in columns))
    sums = {column: totals(rows, column) for column in columns}
    table.add_section()
    table.add_row("in all", *(_cell(sums[column]) for column in columns))
    console.print(table)
    live = sums["live"]
    for column in columns[1:]:
        ratio = sums[column]["moved"] / max(live["moved"], 1)
        alike = [row[column]["same slots"] for row in rows if row[column] and row["live"]]
        console.print(
            f"{column}: {sums[column]['rearrangements']} of {live['rearrangements']} rearrangements, "
            f"{ratio:.3f} times the moved experts; {sum(share == 1 for share in alike)} maps equal in "
            f"every slot, {np.mean(alike):.1%} of all slots.",
            soft_wrap=True,
        )


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    same = f", {entry['same slots']:.0%} same" if "same slots" in entry else ""
    return f"{entry['moved']} ({entry['fetched']}){same}"


def main() -> None:
    """Serve, replay, print and write the comparison."""
    options, console, shape = parse_options(), Console(), ModelShape()
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-eplb-"))
    served = asyncio.run(serve(options, shape, folder))
    head = head_of(shape, options.redundant)
    settings = {
        "step_interval": options.interval_steps,
        "window_size": options.window_steps,
        "use_async": False,
    }
    replays = {size: plans_of(served, head, size, settings) for size in SNAPSHOT_STEPS}
    rows = compared(served, head, replays)
    console.print(
        f"{len(served.counts_NLE)} steps, {served.alone} of them with one idle rank; {settings}; {folder}",
        soft_wrap=True,
    )
    show(rows, ["live", *(f"snapshots of {size}" for size in SNAPSHOT_STEPS)], console)
    if options.output:
        found = {"machine": machine(), "settings": settings, "rows": rows}
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
