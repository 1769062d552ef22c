"""`ep-rebalance doctor`: can this machine and this vLLM run the plugin?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.options import ApiKey, AsJson


def doctor(
    model_name: Annotated[
        str, typer.Option("--model", help="Also check this model: a folder, or a cached name.")
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="Also check this configuration, YAML or JSON.")
    ] = None,
    server_url: Annotated[
        str,
        typer.Option("--server", help="Also ask this running server, e.g. http://localhost:8000."),
    ] = "",
    api_key: ApiKey = "",
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Ask vLLM again what it said before, though nothing changed."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Can this machine and this vLLM run the plugin? One line for each check, with a remedy.

    Exits with 1 if there is a problem. The first time it takes longer, since it imports vLLM and compiles
    the planner.
    """
    from ep_rebalance.commands import diagnosing

    diagnosing.diagnose(
        model_name, config, server_url, api_key=api_key, fresh=fresh, as_json=as_json
    )
