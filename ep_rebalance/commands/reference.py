"""Commands that print what the package itself says: settings, metrics, expert kernels, accelerators."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.telemetry.metrics import METRICS
from ep_rebalance.version import __version__


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


def metrics() -> None:
    """The metrics that the plugin adds to the engine's /metrics, as a Markdown table."""
    print(metric_table())


def kernels() -> None:
    """Which quantised experts may move, by vLLM's quantisation methods and expert kernels, as a Markdown
    table.
    """
    print(kernel_table())


def hardware() -> None:
    """The accelerators that replay and advise know, as YAML to copy and correct."""
    from ep_rebalance.offline.hardware_table import hardware_table

    print(hardware_table(), end="")


def version() -> None:
    """The version of ep-rebalance."""
    print(__version__)


def metric_table() -> str:
    """`METRICS` as a Markdown table, which docs/operations.md contains."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        labels = ", ".join(metric.labels) or "-"
        rows.append(f"| `{metric.full_name}{suffix}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


def kernel_table() -> str:
    """The list of the adapter for vLLM as Markdown; docs/quantisation.md holds this text."""
    table: str = import_module("ep_rebalance.engines.vllm.quantised_pairs").pair_table()
    return table


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
        lines.append(f"{indent}{name}: {json.dumps(field.default)}{_choices(field)}")
    return lines


def _choices(field: FieldInfo) -> str:
    schema = field.json_schema_extra
    values: Any = schema.get("enum", ()) if isinstance(schema, dict) else ()
    if get_origin(field.annotation) is Literal:
        values = get_args(field.annotation)
    if not values:
        return ""
    return f"  # one of {', '.join(map(str, values))}"
