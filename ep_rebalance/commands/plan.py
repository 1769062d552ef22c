"""`ep-rebalance plan`: finds the best placement for recorded load, for any engine to start with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.choices import TARGETS
from ep_rebalance.commands.options import FirstMoeLayer, ModelLayers, RanksPerNode, Traces


def plan(
    traces: Traces,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the placement.")],
    to: Annotated[
        str,
        typer.Option(
            **TARGETS,
            help="For which engine. state: vLLM with this plugin, which takes it as state.path; vLLM alone "
            "can start with no placement.",
        ),
    ],
    ep_size: Annotated[
        int | None, typer.Option(min=2, help="EP ranks.", show_default="as recorded")
    ] = None,
    redundant: Annotated[
        int | None, typer.Option(min=0, help="Redundant experts.", show_default="as recorded")
    ] = None,
    ranks_per_node: RanksPerNode = None,
    layers: ModelLayers = None,
    first_moe_layer: FirstMoeLayer = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="For --to state: a state file saved by the server that is to read the new one."
        ),
    ] = None,
) -> None:
    """Find the best placement for recorded load, for an engine to start with.

    ep-rebalance plan load.eptrace --ep-size 32 --redundant 32 --to sglang -o location.json
    """
    from ep_rebalance.commands import planning

    options = planning.PlanOptions(
        traces=traces,
        output=output,
        to=to,
        ep_size=ep_size,
        redundant=redundant,
        ranks_per_node=ranks_per_node,
        layers=layers,
        first_moe_layer=first_moe_layer,
        like=like,
    )
    planning.plan(options)
