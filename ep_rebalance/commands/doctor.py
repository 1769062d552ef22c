"""`ep-rebalance doctor`: can this machine and this vLLM run the plugin?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ep_rebalance.diagnosis import machine, model, packages, settings
from ep_rebalance.diagnosis.finding import Check, Finding, run_checks

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}


def doctor(
    model_name: Annotated[
        str, typer.Option("--model", help="Also check this model: a folder, or a cached name.")
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="Also check this configuration, YAML or JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Can this machine and this vLLM run the plugin? One line for each check, with the remedy.

    Exits with 1 if there is a problem. Takes some seconds: vLLM is imported, the planner compiled.
    """
    console, shown = Console(), []
    for finding in run_checks(_all(model_name, config)):
        shown.append(finding)
        if not as_json:
            _print(console, finding)
    if as_json:
        print(json.dumps([asdict(finding) for finding in shown], indent=2))
    if any(finding.verdict == "problem" for finding in shown):
        raise typer.Exit(1)


def _all(model_name: str, config: Path | None) -> Iterator[tuple[str, Check]]:
    yield from machine.checks()
    yield from packages.checks()
    yield from _engine()
    yield from settings.checks(config)
    yield from model.checks(model_name)


def _engine() -> list[tuple[str, Check]]:
    if find_spec("vllm") is None:
        return [("vLLM", _no_engine)]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks: list[tuple[str, Check]] = import_module("ep_rebalance.engines.vllm.diagnosis").checks()
    return checks


def _no_engine() -> Finding:
    return Finding(
        check="vLLM",
        verdict="problem",
        found="not installed in this environment",
        remedy="pip install 'ep-rebalance[vllm]'; replay, advise and convert work without it",
    )


def _print(console: Console, finding: Finding) -> None:
    colour = _COLOURS[finding.verdict]
    console.print(
        f"[{colour}]{finding.verdict:8}[/] {escape(f'{finding.check:15}')} {escape(finding.found)}",
        highlight=False,
        soft_wrap=True,
    )
    if finding.remedy:
        console.print(
            f"{'':8} {'':15} -> {escape(finding.remedy)}", highlight=False, soft_wrap=True
        )
