"""Dispatch and combine without the experts between: every exchange of our all-to-all, by turns.

Against the way of vLLM's `allgather_reducescatter` backend: every rank gets all tokens and gives partial
sums of all back. One process per rank; NCCL with a GPU for each, else gloo. Experts give rows back as they
come, so that only the transport is timed. A rank's time is that of the slowest.

    python benchmarks/all_to_all.py                       # on one machine, as many ranks as GPUs
    python benchmarks/all_to_all.py --ranks 4 --json a2a.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ep_rebalance.all_to_all import AllToAll, make_all_to_all
from ep_rebalance.config_sources import load_config
from ep_rebalance.exchanges import EXCHANGES

OURS = "exact buffers, exact"
LOADS = {"even": 0.0, "zipf 0.8": 0.8}
EXPERTS = 64
WARM_UP = 3


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpus = torch.cuda.device_count()
    add("--ranks", type=int, default=gpus or 2, help=f"processes (default {gpus or 2})")
    add("--tokens", type=int, nargs="+", default=[1, 64, 512, 2048], help="per rank")
    add("--hidden", type=int, default=2048, help="columns (default 2048)")
    add("--top-k", type=int, default=8, help="experts of a token (default 8)")
    add("--turns", type=int, default=30, help="of each case (default 30)")
    add("--json", type=Path, help="write all results there, too")
    options = parser.parse_args()
    if EXPERTS % options.ranks:
        parser.error(f"--ranks {options.ranks} does not divide {EXPERTS} experts")
    if gpus and options.ranks > gpus:
        parser.error(f"--ranks {options.ranks}, but there are {gpus} GPUs")
    return options


def through(all_to_all: AllToAll, step: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Dispatch, experts that change nothing, combine."""
    out = torch.empty_like(step["hidden"])

    def run() -> None:
        sent = all_to_all.dispatch(step["hidden"], step["slots"], step["weights"])
        rows = sent.rows_MH
        if sent.pairs_per_row > 1:
            rows = rows.repeat_interleave(sent.pairs_per_row, 0)
        all_to_all.combine(sent, rows, out)

    return run


def gather_and_scatter(step: dict[str, torch.Tensor]) -> Callable[[], None]:
    """All tokens to all ranks, and sums back."""
    ranks = dist.get_world_size()
    parts = {
        name: value.new_empty(ranks * len(value), value.shape[1]) for name, value in step.items()
    }
    out = torch.empty_like(step["hidden"])

    def run() -> None:
        for name, value in step.items():
            dist.all_gather_into_tensor(parts[name], value)
        dist.reduce_scatter_tensor(out, parts["hidden"])

    return run


def candidates(step: dict[str, torch.Tensor], slots_per_rank: int) -> dict[str, Callable[[], None]]:
    """By name, the default first."""

    def ours(combine: str, **plane: str) -> Callable[[], None]:
        config = load_config({"data_plane": plane, "dispatch": {"combine": combine}})
        group = dist.group.WORLD
        return through(make_all_to_all(config, group=group, slots_per_rank=slots_per_rank), step)

    found = {
        f"{name} buffers, {combine}": ours(combine, buffers=name)
        for name in EXCHANGES
        for combine in ("exact", "fast")
    }
    found["exact buffers, fast, fp8"] = ours("fast", buffers="exact", payload="fp8")
    found["all-gather, reduce-scatter"] = gather_and_scatter(step)
    return found


def draw_step(
    options: argparse.Namespace, tokens: int, exponent: float, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tokens of this rank; slots are experts in order."""
    rng = np.random.default_rng((tokens, dist.get_rank()))
    weights = np.arange(1, EXPERTS + 1) ** -exponent
    keys = np.log(rng.random((tokens, EXPERTS))) / weights
    slots = np.argsort(-keys, axis=1)[:, : options.top_k].astype(np.int32)
    return {
        "hidden": torch.randn(tokens, options.hidden, dtype=torch.bfloat16, device=device),
        "slots": torch.from_numpy(slots).to(device),
        "weights": torch.full((tokens, options.top_k), 1 / options.top_k, device=device),
    }


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """From a common start to the end of the slowest rank."""
    dist.barrier()
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_rank(rank: int, options: argparse.Namespace, store: str, answers: Any) -> None:
    """One process: times every case, and rank 0 tells."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # newer torch has other names for some collectives
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.ranks,
    )
    cases = list(itertools.product(options.tokens, LOADS.items()))
    shown = track(cases, "measuring", console=Console(), disable=rank > 0)
    for tokens, (load, exponent) in shown:
        step = draw_step(options, tokens, exponent, device)
        runs = candidates(step, EXPERTS // options.ranks)
        for run in runs.values():
            for _ in range(WARM_UP):
                run()
        seconds = [[seconds_of(run, device) for run in runs.values()] for _ in range(options.turns)]
        if rank == 0:
            answers.append(
                {"tokens": tokens, "load": load, "names": list(runs), "seconds": seconds}
            )
    dist.destroy_process_group()


def as_table(results: list[dict[str, Any]]) -> Table:
    """One row per case, one column per candidate."""
    names = results[0]["names"]
    table = Table(title=f"{OURS} in milliseconds; the others' times over it, median (10 %-90 %)")
    for heading in ("tokens per rank", "load", *names):
        table.add_column(heading, justify="right")
    for result in results:
        seconds = np.array(result["seconds"])
        low, middle, high = np.percentile(seconds[:, 1:] / seconds[:, :1], [10, 50, 90], axis=0)
        ratios = [f"{m:.2f} ({a:.2f}-{b:.2f})" for a, m, b in zip(low, middle, high, strict=True)]
        ours = f"{1e3 * np.median(seconds[:, 0]):.2f}"
        table.add_row(str(result["tokens"]), result["load"], ours, *ratios)
    return table


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(width=max(140, Console().width))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as shared:
        answers = shared.list()
        mp.spawn(run_rank, (options, f"{folder}/store", answers), nprocs=options.ranks)
        results = list(answers)
    console.print(as_table(results))
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "gloo on CPU"
    console.print(
        f"{options.ranks} ranks, {on}; {options.hidden} columns of bfloat16, top {options.top_k} of "
        f"{EXPERTS}, {options.turns} turns",
        style="dim",
    )
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    if options.json:
        described = {"machine": machine(), "device": on, "results": results}
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
