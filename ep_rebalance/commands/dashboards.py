"""`ep-rebalance dashboards`: Grafana dashboards, alert rules and examples that deploy them."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.dashboards.build import DASHBOARDS, stale

_CODE = shutil.ignore_patterns("*.py", "__pycache__")


def dashboards(
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; it is created if it does not exist.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check that the files are what the code generates.")
    ] = False,
) -> None:
    """Grafana dashboards, alert rules, and examples for containers and Kubernetes.

    Without options, lists the dashboards.
    """
    with as_file(files("ep_rebalance.dashboards")) as source:
        if check:
            _check(source)
        elif out is not None:
            _copy(source, out, force=force)
        else:
            for dashboard in DASHBOARDS:
                print(f"{dashboard.uid:24} {dashboard.text}")
            typer.echo("Copy them with --out DIR; DIR/README.md says how to use them.", err=True)


def _check(source: Path) -> None:
    if old := stale(source):
        typer.echo(f"Not what the code generates: {', '.join(old)}. Run make dashboards.", err=True)
        raise typer.Exit(1)
    typer.echo("All files are what the code generates.", err=True)


def _copy(source: Path, out: Path, *, force: bool) -> None:
    """Refuses to write over anything unless `force`."""
    names = [path.relative_to(source) for path in source.rglob("*") if _is_shipped(path)]
    there = sorted(str(name) for name in names if (out / name).exists())
    if there and not force:
        typer.echo(
            f"{out} already holds {', '.join(there[:3])}{' and more' if there[3:] else ''}. "
            "Name another folder, or overwrite them with --force.",
            err=True,
        )
        raise typer.Exit(2)
    try:
        shutil.copytree(source, out, ignore=_CODE, dirs_exist_ok=True)
    except OSError as error:
        typer.echo(f"{out} cannot be written: {error}. Name another folder.", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{len(names)} files in {out}; begin with {out / 'README.md'}", err=True)


def _is_shipped(path: Path) -> bool:
    return path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
