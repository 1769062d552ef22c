"""The `ep-rebalance` command.

A command's module is imported when it runs: that of another one may take longer than its work.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "advise": (
        "advise:advise",
        "Is there anything to gain from moving experts, and how should this load be served?",
    ),
    "config": (
        "reference:config",
        "Every setting with its default and meaning, as YAML that --ep-rebalance-config reads.",
    ),
    "convert": (
        "convert:convert",
        "Turn recordings of other engines into traces, or write placements for other engines.",
    ),
    "dashboards": (
        "dashboards:dashboards",
        "Grafana dashboards, alert rules, and examples for containers and Kubernetes.",
    ),
    "doctor": (
        "doctor:doctor",
        "Can this machine and this vLLM run the plugin? One line for each check, with a remedy.",
    ),
    "hardware": (
        "reference:hardware",
        "The accelerators that replay and advise know, as YAML to copy and correct.",
    ),
    "inspect": (
        "inspection:inspect",
        "Show what a trace, a state file or a live server holds.",
    ),
    "kernels": (
        "reference:kernels",
        "Which quantised experts may move, by vLLM's quantisation methods and expert kernels, as a Markdown "
        "table.",
    ),
    "metrics": (
        "reference:metrics",
        "The metrics that the plugin adds to the engine's /metrics, as a Markdown table.",
    ),
    "plan": (
        "plan:plan",
        "Find the best placement for recorded load, for an engine to start with.",
    ),
    "record": (
        "record:record",
        "Record a running vLLM without the plugin: send it prompts, and count the experts of its answers.",
    ),
    "replay": (
        "replay:run_replay",
        "Replay recorded load against placement policies: would rebalancing help, and at what cost?",
    ),
    "status": (
        "status:status",
        "Show what a running server's balancer has done and gained.",
    ),
    "version": ("reference:version", "The version of ep-rebalance."),
}
"""Of each command, its function below `ep_rebalance.commands`, and the first paragraph of its help."""


class Commands(TyperGroup):
    """Knows of each command no more than its line until it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, its module imported."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load_command(name), rest


def load_command(name: str) -> TyperCommand:
    """One of COMMANDS, with its options."""
    module, _, function = COMMANDS[name][0].partition(":")
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(import_module(f"ep_rebalance.commands.{module}"), function))
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand)
    return command


def _not_loaded() -> None:
    """Stands for a command in the list of all."""


app = typer.Typer(
    cls=Commands,
    help="Expert-parallel load balancing for Mixture-of-Experts serving. The balancer itself runs inside the "
    "engine: vllm serve MODEL --enable-expert-parallel --plugin ep_rebalance",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name, (_, _line) in COMMANDS.items():
    app.command(_name, help=_line)(_not_loaded)


def main() -> None:
    """Entry point of the `ep-rebalance` script. vLLM logs only errors, here and in processes started here."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    app()
