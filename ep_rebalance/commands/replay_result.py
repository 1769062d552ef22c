"""What `ep-rebalance replay` shows: one JSON-ready result, and what of it fits into a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.filesize import decimal

from ep_rebalance.commands.output import Shown
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import TraceHead, TraceReader
from ep_rebalance.offline.eplb_settings import steps_before_first
from ep_rebalance.offline.report.frontier import PRICE_TITLES, Price, best_for
from ep_rebalance.offline.report.next_step import next_step
from ep_rebalance.offline.report.sizes import Size, by_size
from ep_rebalance.offline.report.verdict import verdicts
from ep_rebalance.offline.report.words import waiting_step
from ep_rebalance.offline.run import Replayed
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.version import __version__

SCHEMA_VERSION = 1

_FRONTIER_MARKS: Mapping[Price, str] = {"moved": "B", "memory": "M"}


def as_json(
    readers: Sequence[TraceReader],
    head: TraceHead,
    settings: RebalanceConfig,
    expert_time: ExpertTime,
    replayed: Sequence[Replayed],
    *,
    hardware: dict[str, Any] | None = None,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """Everything that is shown, JSON-ready; the table and the CSV contain parts of it. If the size of an
    expert is not known, bytes and what hangs on them are None.

    head: of the trace, with what it lacks itself.
    expert_time: what of a recorded step is taken to wait for experts.
    hardware: name and figures of the accelerator that steps are modelled on; None if they are not.
    ranks_per_node: as asked for; None if as recorded.
    """
    sizes = by_size(head, replayed)
    size_of = {one: size for size in sizes for one in size.results}
    best, following = best_for(sizes), next_step(head, replayed)
    return {
        "schema_version": SCHEMA_VERSION,
        "plugin_version": __version__,
        "verdict": {
            "sentences": [_plain(sentence) for sentence in verdicts(head, replayed)],
            "next": _plain(following.text),
            "command": following.command,
        },
        "trace": {
            "files": [str(reader.path) for reader in readers],
            "started": head.started,
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
        "hardware": hardware,
        "ranks_per_node": ranks_per_node,
        "expert_time": asdict(expert_time),
        "frontier": {
            price: [number for number, one in enumerate(replayed) if price in best[one]]
            for price in PRICE_TITLES
        },
        "rows": [_row(head, size_of[one], one) for one in replayed],
    }


def _plain(sentence: str) -> str:
    return sentence.replace("\N{NO-BREAK SPACE}", " ")


def _row(head: TraceHead, size: Size, one: Replayed) -> dict[str, Any]:
    scenario, gain = one.scenario, size.gain(one)
    outcomes: dict[str, int] = {}
    for plan in one.plans:
        outcomes[plan.outcome] = outcomes.get(plan.outcome, 0) + 1
    return {
        "policy": scenario.policy,
        "ep_size": size.ranks,
        "redundant_experts": size.redundant,
        "redundant_bytes": size.redundant_bytes,
        "eplb": scenario.eplb.settings.model_dump() if scenario.eplb else {},
        "imbalance": one.mean_imbalance,
        "balancedness": one.mean_balancedness,
        "home_share": one.home_share,
        "node_share": one.node_share,
        "step_seconds": one.mean_step_seconds,
        "step_time_saved": gain.saved if gain else None,
        "step_time_saved_error": gain.error if gain else None,
        "plans": outcomes,
        "experts_moved": one.moved,
        "bytes_moved": one.moved_bytes if size.bytes_known else None,
        "bytes_moved_per_hour": one.moved_bytes / one.hours if size.bytes_known else None,
        "stall_seconds": one.stall_seconds if size.bytes_known else None,
        "plan_milliseconds": 1e3 * sum(one.plan_seconds) / max(len(one.plan_seconds), 1),
        "commits": [
            {
                "generation": plan.generation,
                "step": plan.step,
                "served_at": plan.served_at,
                "experts_moved": plan.moved,
                "bytes": plan.bytes,
                "layers": [head.layer_numbers[layer] for layer in plan.layers],
                "stall_seconds": plan.stall_seconds,
                "serial_transfers": plan.serial_transfers,
                "predicted_gain": plan.predicted_gain,
                "expert_time": asdict(plan.expert_time),
            }
            for plan in one.commits
        ],
    }


def shown(result: dict[str, Any]) -> Shown:
    """A result as every format shows it. The table fits into 80 columns; the rest is in the JSON."""
    verdict, several = result["verdict"], _several_sizes(result)
    marks = [_marks(result, number) for number in range(len(result["rows"]))]
    cells = [_cells(row) for row in result["rows"]]
    titles = [
        "policy",
        "EP",
        "max",
        "balance",
        "home",
        "node",
        "step ms",
        "saved",
        "plans",
        "bytes",
    ]
    return Shown(
        result=result,
        title="Replay",
        sentences=[*verdict["sentences"], verdict["next"]],
        command=verdict["command"],
        titles=[*titles, "best"] if several else titles,
        texts=("policy", "best"),
        cells=[[*row, mark] for row, mark in zip(cells, marks, strict=True)] if several else cells,
        caption=_caption(result),
        lines=[_line(result, number) for number in range(len(result["rows"]))],
    )


def _several_sizes(result: dict[str, Any]) -> bool:
    return len({(row["ep_size"], row["redundant_experts"]) for row in result["rows"]}) > 1


def _marks(result: dict[str, Any], number: int) -> str:
    best = result["frontier"]
    return "".join(mark for price, mark in _FRONTIER_MARKS.items() if number in best[price])


def _cells(row: dict[str, Any]) -> list[str]:
    saved, plans = row["step_time_saved"], row["plans"]
    return [
        row["policy"],
        f"{row['ep_size']}+{row['redundant_experts']}",
        f"{row['imbalance']:.3f}",
        f"{row['balancedness']:.3f}",
        f"{row['home_share']:.0%}",
        f"{row['node_share']:.0%}",
        f"{1e3 * row['step_seconds']:.1f}",
        "-" if saved is None else f"{saved:.1%}",
        f"{plans.get('committed', 0)}/{sum(plans.values())}" if plans else "-",
        decimal(row["bytes_moved"]) if plans and row["bytes_moved"] is not None else "-",
    ]


def _line(result: dict[str, Any], number: int) -> dict[str, Any]:
    row = result["rows"][number]
    flat = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
    best = result["frontier"]
    return flat | {f"best_for_{price}": int(number in best[price]) for price in best}


def _caption(result: dict[str, Any]) -> str:
    trace, waiting = result["trace"], ExpertTime(**result["expert_time"])
    step = waiting_step(trace["recorded_ep_size"], "a recorded step")
    return (
        f"{trace['snapshots']} snapshots of {trace['steps']} steps of {trace['model']} "
        f"({trace['origin']}). EP: ranks+redundant experts. max: load of the busiest rank over the mean; "
        "balance: its inverse, mean over layers. home, node: (token, expert) pairs that stay on their rank, "
        "on their node. Every plan is scored on load that it had not seen. Plans: committed / made. "
        f"{waiting.text} of {step} is taken to wait for the busiest ranks' experts."
        f"{_best(result)}{_stalls(result)}{_too_short(result)}"
    )


def _best(result: dict[str, Any]) -> str:
    """What the last column means."""
    if not _several_sizes(result):
        return ""
    return (
        " best: no other row of that many ranks has better balance for as few bytes moved (B), or for as "
        "little redundant memory on a rank (M)."
    )


def _stalls(result: dict[str, Any]) -> str:
    """How long policies that moved experts stood still for them, which the step times leave out."""
    stalls = [
        f"{row['policy']} {row['ep_size']}+{row['redundant_experts']} {row['stall_seconds']:.3g} s"
        for row in result["rows"]
        if row["commits"] and row["stall_seconds"] is not None
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


def check_gain(result: dict[str, Any], least: float) -> None:
    """Exit with 1 if `ours` saves less than `least` of the step time, with 2 if that is not known."""
    saved = [row["step_time_saved"] for row in result["rows"] if row["policy"] == "ours"]
    if not saved or None in saved:
        typer.echo("ep-rebalance: --fail-below-gain compares --policy ours with none", err=True)
        raise typer.Exit(2)
    if min(saved) < least:
        typer.echo(f"ep-rebalance: {min(saved):.2%} saved, less than {least:.2%}", err=True)
        raise typer.Exit(1)
