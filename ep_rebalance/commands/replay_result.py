"""What `ep-rebalance replay` shows: one JSON-ready result, as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import TraceReader
from ep_rebalance.offline.eplb_settings import steps_before_first
from ep_rebalance.offline.run import Replayed
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.version import __version__

SCHEMA_VERSION = 1


class Format(StrEnum):
    """Format of the output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def as_json(
    readers: Sequence[TraceReader],
    settings: RebalanceConfig,
    expert_time: ExpertTime,
    replayed: Sequence[Replayed],
) -> dict[str, Any]:
    """Everything that is shown, JSON-ready; the table and the CSV contain parts of it.

    expert_time: what of a recorded step is taken to wait for experts.
    """
    head = readers[0].head
    baseline = {
        (r.scenario.topology.num_ranks, r.scenario.config.planner.redundant_experts): r
        for r in replayed
        if r.scenario.policy == "none"
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "plugin_version": __version__,
        "trace": {
            "files": [str(reader.path) for reader in readers],
            "model": head.model,
            "origin": head.origin or "recorded",
            "layers": head.layers,
            "experts": head.experts,
            "top_k": head.top_k,
            "recorded_ep_size": head.ep_size,
            "snapshots": len(replayed[0].step_N),
            "steps": int(replayed[0].steps_N.sum()),
        },
        "config": settings.as_dict(),
        "expert_time": asdict(expert_time),
        "rows": [_row(one, baseline, head.layer_numbers) for one in replayed],
    }


def _row(
    one: Replayed, baseline: dict[tuple[int, int], Replayed], moe_layers: list[int]
) -> dict[str, Any]:
    scenario = one.scenario
    size = (scenario.topology.num_ranks, scenario.config.planner.redundant_experts)
    gain = None
    if size in baseline:
        gain = 1.0 - one.mean_step_seconds / baseline[size].mean_step_seconds
    outcomes: dict[str, int] = {}
    for plan in one.plans:
        outcomes[plan.outcome] = outcomes.get(plan.outcome, 0) + 1
    return {
        "policy": scenario.policy,
        "ep_size": size[0],
        "redundant_experts": size[1],
        "eplb": scenario.eplb.settings.model_dump() if scenario.eplb else {},
        "imbalance": one.mean_imbalance,
        "balancedness": one.mean_balancedness,
        "home_share": one.home_share,
        "node_share": one.node_share,
        "step_seconds": one.mean_step_seconds,
        "step_time_saved": gain,
        "plans": outcomes,
        "experts_moved": one.moved,
        "bytes_moved": one.moved_bytes,
        "bytes_moved_per_hour": one.moved_bytes / one.hours,
        "stall_seconds": one.stall_seconds,
        "plan_milliseconds": 1e3 * sum(one.plan_seconds) / max(len(one.plan_seconds), 1),
        "commits": [
            {
                "generation": plan.generation,
                "step": plan.step,
                "served_at": plan.served_at,
                "experts_moved": plan.moved,
                "bytes": plan.bytes,
                "layers": [moe_layers[layer] for layer in plan.layers],
                "stall_seconds": plan.stall_seconds,
                "serial_transfers": plan.serial_transfers,
                "predicted_gain": plan.predicted_gain,
                "expert_time": asdict(plan.expert_time),
            }
            for plan in one.commits
        ],
    }


def write(result: dict[str, Any], format_: Format, output: Path | None) -> None:
    """Write a result to a file, or to stdout if `output` is None."""
    if format_ == Format.TABLE:
        with open(output, "w", encoding="utf-8") if output else _stdout() as file:
            console = Console(file=file, width=120 if output else None)
            console.print(_table(result))
            console.print(_caption(result), style="dim", highlight=False)
        return
    text = json.dumps(result, indent=2) + "\n" if format_ == Format.JSON else _csv(result)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


@contextmanager
def _stdout() -> Iterator[Any]:
    yield sys.stdout


def _caption(result: dict[str, Any]) -> str:
    trace, waiting = result["trace"], ExpertTime(**result["expert_time"])
    return (
        f"{trace['snapshots']} snapshots of {trace['steps']} steps of {trace['model']} "
        f"({trace['origin']}). EP: ranks+redundant experts. max: load of the busiest rank over the mean; "
        "balance: its inverse, mean over layers. home, node: (token, expert) pairs that stay on their rank, "
        "on their node. Every plan is scored on load that it had not seen. Plans: committed / made. "
        f"{waiting.text} of a recorded step is taken to wait for the busiest ranks' experts."
        f"{_stalls(result)}{_too_short(result)}"
    )


def _stalls(result: dict[str, Any]) -> str:
    """How long policies that moved experts stood still for them, which the step times leave out."""
    stalls = [
        f"{row['policy']} {row['stall_seconds']:.3g} s" for row in result["rows"] if row["commits"]
    ]
    return f" Standing still for experts on their way: {', '.join(stalls)}." if stalls else ""


def _too_short(result: dict[str, Any]) -> str:
    """Why vLLM's balancer never acted, if it did not."""
    first = {
        row["policy"]: steps_before_first(row["eplb"]["step_interval"])
        for row in result["rows"]
        if row["eplb"] and not row["plans"]
    }
    return "".join(f" {name} acts first after {steps:,} steps." for name, steps in first.items())


def _table(result: dict[str, Any]) -> Table:
    """What fits into 80 columns; the rest is in the JSON."""
    table = Table(title="Replay", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("policy", "EP", "max", "balance", "home", "node", "step ms", "saved",
                 "plans", "bytes"):  # fmt: skip
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result["rows"]:
        saved, plans = row["step_time_saved"], row["plans"]
        table.add_row(
            row["policy"],
            f"{row['ep_size']}+{row['redundant_experts']}",
            f"{row['imbalance']:.3f}",
            f"{row['balancedness']:.3f}",
            f"{row['home_share']:.0%}",
            f"{row['node_share']:.0%}",
            f"{1e3 * row['step_seconds']:.1f}",
            "-" if saved is None else f"{saved:.1%}",
            f"{plans.get('committed', 0)}/{sum(plans.values())}" if plans else "-",
            decimal(row["bytes_moved"]) if plans else "-",
        )
    return table


def _csv(result: dict[str, Any]) -> str:
    rows = [
        {key: value for key, value in row.items() if not isinstance(value, list | dict)}
        for row in result["rows"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_gain(result: dict[str, Any], least: float) -> None:
    """Exit with 1 if `ours` saves less than `least` of the step time, with 2 if that is not known."""
    saved = [row["step_time_saved"] for row in result["rows"] if row["policy"] == "ours"]
    if not saved or None in saved:
        typer.echo("ep-rebalance: --fail-below-gain compares --policy ours with none", err=True)
        raise typer.Exit(2)
    if min(saved) < least:
        typer.echo(f"ep-rebalance: {min(saved):.2%} saved, less than {least:.2%}", err=True)
        raise typer.Exit(1)
