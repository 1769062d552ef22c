"""`ep-rebalance inspect`: what a trace, a state file or a live server holds."""

from __future__ import annotations

from typing import Annotated

import typer

from ep_rebalance.commands.options import ApiKey, AsJson


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help="A trace (*.eptrace, or a folder of them), a state file (*.npz), or the address of a "
            "server, e.g. http://localhost:8000"
        ),
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep showing a live server, until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
    api_key: ApiKey = "",
) -> None:
    """Show what a trace, a state file or a live server holds."""
    from ep_rebalance.commands import inspecting

    inspecting.inspect(source, watch=watch, as_json=as_json, api_key=api_key)
