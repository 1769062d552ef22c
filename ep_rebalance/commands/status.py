"""`ep-rebalance status`: what a running server's balancer has done and gained."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from ep_rebalance.commands.options import ApiKey
from ep_rebalance.commands.output import console
from ep_rebalance.diagnosis.server import WHY_NO_STATUS, NoStatus, fetch_status, told_self_test
from ep_rebalance.telemetry.metrics import Status


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
        print(json.dumps(answer.as_sent, indent=2))
        return
    console().print(status_table(answer.status))


def status_table(status: Status) -> Table:
    """A table of a status."""

    def overall(placement: str) -> str:
        ratio = status.overall_imbalance.get(placement)
        return "no traffic yet" if ratio is None else f"{ratio:.3f}"

    table = Table("", "", title=f"ep_rebalance on {status.model}", show_header=False)
    table.add_row(
        "mode, policy", ", ".join(status.info.get(name, "not told") for name in ("mode", "policy"))
    )
    table.add_row("ranks, slots, experts", f"{status.ep_size}, {status.slots}, {status.experts}")
    table.add_row("self-test", told_self_test(status))
    table.add_row("generation", str(status.generation))
    table.add_row("now", "paused" if status.paused else status.activity)
    table.add_row("imbalance (max/mean)", overall("served"))
    table.add_row("imbalance without us", overall("contiguous"))
    table.add_row("plans", ", ".join(f"{n} {k}" for k, n in status.plans.items() if n) or "none")
    table.add_row("waits for experts", _told_expert_time(status))
    table.add_row("experts moved", str(sum(status.migrated_experts.values())))
    table.add_row("bytes moved", f"{sum(status.migrated_bytes.values()):,}")
    for file, why in status.file_faults.items():
        if why:
            table.add_row(f"{file} not written", why)
    table.add_row("last word", status.message or status.last_decision)
    if status.drafter:
        table.add_row("drafter", _told_drafter(status.drafter))
    if status.uncounted_drafter:
        table.add_row("drafter", f"not counted: {status.uncounted_drafter}")
    return table


def _told_drafter(status: Status) -> str:
    """The status of a drafter, in a line."""
    now, before = (status.overall_imbalance.get(name) for name in ("served", "contiguous"))
    moved = sum(status.migrated_experts.values())
    known = now is not None and before is not None
    balance = f"imbalance {now:.3f}, without us {before:.3f}" if known else "no traffic yet"
    return f"{balance}; {moved} experts moved"


def _told_expert_time(status: Status) -> str:
    """The fraction of a step by which plans are judged."""
    fraction = status.expert_time
    if not {"low", "estimate", "high"} <= fraction.keys():
        return "no plan yet"
    low, estimate, high = (fraction[bound] for bound in ("low", "estimate", "high"))
    if low == high:
        return f"{estimate:.0%} of a step, set"
    known = "learned" if status.expert_time_learned else status.expert_time_reason
    return f"{low:.0%} to {high:.0%} of a step: {known}"
