"""The `ep-rebalance` command."""

from __future__ import annotations

import http.client
import json
import types
import urllib.error
import urllib.request
from typing import Annotated, Any, get_args, get_origin

import msgspec
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from ep_rebalance import __version__
from ep_rebalance.commands.advise import advise
from ep_rebalance.commands.replay import run_replay
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.metrics import METRICS, decode
from ep_rebalance.replay.step_time import hardware_table

app = typer.Typer(
    help="Expert-parallel load balancing for Mixture-of-Experts serving. The balancer itself runs inside the "
    "engine: vllm serve MODEL --enable-expert-parallel --plugin ep_rebalance",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("replay")(run_replay)
app.command()(advise)


@app.command()
def config(
    schema: Annotated[
        bool, typer.Option("--json-schema", help="Print the JSON schema instead.")
    ] = False,
) -> None:
    """Every setting with its default and meaning, as YAML that --ep-rebalance-config reads."""
    if schema:
        print(json.dumps(RebalanceConfig.model_json_schema(), indent=2))
        return
    print("\n".join(_commented_yaml(RebalanceConfig, indent="")))


@app.command()
def metrics() -> None:
    """The metrics that the plugin adds to the engine's /metrics, as a Markdown table."""
    print(metric_table())


@app.command()
def status(
    url: Annotated[str, typer.Argument(help="Address of the server, e.g. http://localhost:8000")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the server's answer as it is.")
    ] = False,
    api_key: Annotated[str, typer.Option(envvar="VLLM_API_KEY", help="The server's API key.")] = "",
) -> None:
    """What a running server's balancer did and gained."""
    answer = _get(f"{url.rstrip('/')}/ep_rebalance/status", api_key)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    Console().print(_status_table(answer))


@app.command()
def hardware() -> None:
    """The accelerators that replay and advise know, as YAML to copy and correct."""
    print(hardware_table(), end="")


@app.command()
def version() -> None:
    """The version of ep-rebalance."""
    print(__version__)


def metric_table() -> str:
    """`METRICS` as Markdown; README holds this text."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        labels = ", ".join(metric.labels) or "-"
        rows.append(f"| `{metric.full_name}{suffix}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


def _commented_yaml(model: type[BaseModel], indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += ["", f"{indent}# {(field.annotation.__doc__ or '').strip().splitlines()[0]}"]
            inner = _commented_yaml(field.annotation, indent + "  ")
            lines += [f"{indent}{name}:{'' if inner else ' {}'}", *inner]
            continue
        words = " ".join((field.description or "").split())
        if words:
            lines.append(f"{indent}# {words}")
        lines.append(f"{indent}{name}: {json.dumps(field.default)}{_choices(field.annotation)}")
    return lines


def _choices(annotation: Any) -> str:
    values = get_args(annotation)
    if not values or get_origin(annotation) is types.UnionType:
        return ""
    return f"  # one of {', '.join(map(str, values))}"


def _get(url: str, api_key: str) -> dict[str, Any]:
    try:
        request = urllib.request.Request(url)
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=10) as response:
            payload = response.read()
        decode(payload)
        answer: dict[str, Any] = json.loads(payload)
        return answer
    except (OSError, http.client.HTTPException, ValueError, msgspec.MsgspecError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        typer.echo(f"{url} did not answer with a status: {error}", err=True)
        typer.echo(
            "Is the server up, was it started with --plugin ep_rebalance, and is --api-key right?",
            err=True,
        )
        raise typer.Exit(1) from None


def _status_table(answer: dict[str, Any]) -> Table:
    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.3f}" if values else "no traffic yet"

    table = Table("", "", title=f"ep_rebalance on {answer['model']}", show_header=False)
    table.add_row("mode, policy", f"{answer['info']['mode']}, {answer['info']['policy']}")
    table.add_row(
        "ranks, slots, experts", f"{answer['ep_size']}, {answer['slots']}, {answer['experts']}"
    )
    table.add_row("generation", str(answer["generation"]))
    table.add_row("imbalance (max/mean)", mean(answer["imbalance"]))
    table.add_row("imbalance without us", mean(answer["contiguous_imbalance"]))
    table.add_row("plans", ", ".join(f"{n} {k}" for k, n in answer["plans"].items() if n) or "none")
    table.add_row("experts moved", str(sum(answer["migrated_experts"].values())))
    table.add_row("bytes moved", f"{sum(answer['migrated_bytes'].values()):,}")
    table.add_row("last word", answer["message"] or answer["last_decision"])
    return table


def main() -> None:
    """Entry point of the `ep-rebalance` script."""
    app()
