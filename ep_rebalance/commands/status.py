"""`ep-rebalance status`: what a running server's balancer has done and gained."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ep_rebalance.commands.options import ApiKey
from ep_rebalance.diagnosis.server import WHY_NO_STATUS, NoStatus, fetch_status, told_self_test


def status(
    url: Annotated[str, typer.Argument(help="Address of the server, e.g. http://localhost:8000")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the server's answer as it is.")
    ] = False,
    api_key: ApiKey = "",
) -> None:
    """Show what a running server's balancer has done and gained."""
    try:
        answer = fetch_status(url, api_key)
    except NoStatus as error:
        typer.echo(str(error), err=True)
        typer.echo(WHY_NO_STATUS, err=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    Console().print(status_table(answer))


def status_table(answer: dict[str, Any]) -> Table:
    """A table of a status.

    answer: as `fetch_status` returns it.
    """

    def overall(placement: str) -> str:
        ratio = answer["overall_imbalance"].get(placement)
        return "no traffic yet" if ratio is None else f"{ratio:.3f}"

    table = Table("", "", title=f"ep_rebalance on {answer['model']}", show_header=False)
    table.add_row("mode, policy", f"{answer['info']['mode']}, {answer['info']['policy']}")
    table.add_row(
        "ranks, slots, experts", f"{answer['ep_size']}, {answer['slots']}, {answer['experts']}"
    )
    table.add_row("self-test", told_self_test(answer))
    table.add_row("generation", str(answer["generation"]))
    table.add_row("now", "paused" if answer["paused"] else answer["activity"])
    table.add_row("imbalance (max/mean)", overall("served"))
    table.add_row("imbalance without us", overall("contiguous"))
    table.add_row("plans", ", ".join(f"{n} {k}" for k, n in answer["plans"].items() if n) or "none")
    table.add_row("waits for experts", _told_expert_time(answer))
    table.add_row("experts moved", str(sum(answer["migrated_experts"].values())))
    table.add_row("bytes moved", f"{sum(answer['migrated_bytes'].values()):,}")
    for file, why in answer["file_faults"].items():
        if why:
            table.add_row(f"{file} not written", why)
    table.add_row("last word", answer["message"] or answer["last_decision"])
    if drafter := answer.get("drafter"):
        table.add_row("drafter", _told_drafter(drafter))
    if why := answer.get("uncounted_drafter"):
        table.add_row("drafter", f"not counted: {why}")
    return table


def _told_drafter(answer: dict[str, Any]) -> str:
    """The status of a drafter, in a line."""
    now, before = (answer["overall_imbalance"].get(name) for name in ("served", "contiguous"))
    moved = sum(answer["migrated_experts"].values())
    balance = "no traffic yet" if now is None else f"imbalance {now:.3f}, without us {before:.3f}"
    return f"{balance}; {moved} experts moved"


def _told_expert_time(answer: dict[str, Any]) -> str:
    """The fraction of a step by which plans are judged."""
    fraction = answer["expert_time"]
    if not fraction:
        return "no plan yet"
    low, estimate, high = (fraction[bound] for bound in ("low", "estimate", "high"))
    if low == high:
        return f"{estimate:.0%} of a step, set"
    known = "learned" if answer["expert_time_learned"] else answer["expert_time_reason"]
    return f"{low:.0%} to {high:.0%} of a step: {known}"
