"""What `ep-rebalance doctor` does: makes every check, and prints a line for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ep_rebalance.commands.output import console
from ep_rebalance.diagnosis import machine, model, packages, server, settings
from ep_rebalance.diagnosis.engine import Engine
from ep_rebalance.diagnosis.finding import Check, Finding, run_checks
from ep_rebalance.printable import printable

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}
_VERDICT, _CHECK = 8, 21
"""Widths of the columns, in characters."""
_LONG = {
    "processor": "imports torch",
    "planner": "compiles the planner, which takes up to a minute the first time on a machine",
    "vLLM": "imports vLLM and checks what the plugin relies on; the answer is kept",
    "model": "imports vLLM to have it read the model's configuration; the answer is kept",
    "architecture": "imports vLLM's list of models; the answer is kept",
}
"""What checks do that may take seconds."""


def diagnose(
    model_name: str,
    config: Path | None,
    server_url: str,
    *,
    api_key: str,
    fresh: bool,
    as_json: bool,
) -> None:
    """Print what each check finds. Exits with 1 if there is a problem.

    model_name: a model to check, too; "" for none.
    config: settings to check, too.
    server_url: a running server to ask, too; "" for none.
    fresh: whether to ask vLLM again what it said before.
    """
    terminal, shown = console(), []
    every = _all(model_name, config, server_url, api_key, Engine(fresh=fresh))
    with terminal.status("") as status:
        for finding in run_checks(every, lambda name: status.update(_LONG.get(name, name))):
            shown.append(finding)
            if not as_json:
                _print(terminal, finding)
    if as_json:
        print(json.dumps([asdict(finding) for finding in shown], indent=2))
    if any(finding.verdict == "problem" for finding in shown):
        raise typer.Exit(1)


def _all(
    model_name: str, config: Path | None, server_url: str, api_key: str, engine: Engine
) -> Iterator[tuple[str, Check]]:
    yield from machine.checks()
    yield from packages.checks()
    yield "vLLM", lambda: _engine(engine)
    yield from settings.checks(config)
    yield from model.checks(model_name, config, engine)
    yield from server.checks(server_url, api_key)


def _engine(engine: Engine) -> Iterable[Finding]:
    if not engine.installed:
        return [_no_engine()]
    answer = engine.findings()
    found = [Finding(**one) for one in answer.value]
    if answer.kept_since is None:
        return found
    asked = datetime.fromtimestamp(answer.kept_since).astimezone()
    since = f"as seen {asked:%Y-%m-%d %H:%M}; nothing has changed since"
    return [replace(finding, found=f"{finding.found} ({since})") for finding in found]


def _no_engine() -> Finding:
    return Finding(
        check="vLLM",
        verdict="problem",
        found="not installed in this environment",
        remedy="pip install 'ep-rebalance[vllm]'; replay, advise and convert work without it",
    )


def _print(terminal: Console, finding: Finding) -> None:
    """Print a row at once, since some checks take seconds. A pipe gets plain lines."""
    finding = Finding(**printable(asdict(finding)))
    remedy = f"-> {finding.remedy}" if finding.remedy else ""
    if terminal.is_terminal:
        terminal.print(_row(finding, remedy))
        return
    found = " ".join(finding.found.split())
    print(f"{finding.verdict:{_VERDICT}} {finding.check:{_CHECK}} {found}")
    if remedy:
        print(f"{'':{_VERDICT}} {'':{_CHECK}} {remedy}")


def _row(finding: Finding, remedy: str) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=_VERDICT, style=_COLOURS[finding.verdict])
    table.add_column(width=_CHECK)
    table.add_column()
    table.add_row(Text(finding.verdict), Text(finding.check), Text(finding.found))
    if remedy:
        table.add_row("", "", Text(remedy))
    return table
