"""`ep-rebalance record`: a trace of a running vLLM that has no plugin, by the expert ids in its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.options import ApiKey, FirstMoeLayer, Quiet
from ep_rebalance.load.trace_names import SUFFIX

_Prompts = Annotated[
    Path,
    typer.Option(
        help="The prompts to send: a text of one a line, or JSON lines (.jsonl), each a text, a list of "
        "messages, or the body of a request."
    ),
]
_Output = Annotated[Path, typer.Option("--output", "-o", help=f"The trace to write (*{SUFFIX}).")]


def record(
    url: Annotated[str, typer.Argument(help="Address of the server, e.g. http://localhost:8000")],
    prompts: _Prompts,
    output: _Output,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate, where a body does not say.")
    ] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    tokens_per_snapshot: Annotated[int, typer.Option(min=1, help="Tokens of a snapshot.")] = 4096,
    steps_per_snapshot: Annotated[
        int, typer.Option(min=1, help="Engine steps that a snapshot is said to cover.")
    ] = 16,
    model: Annotated[
        str, typer.Option(help="The model to ask.", show_default="the server's first")
    ] = "",
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts of a layer.", show_default="by the largest id"),
    ] = None,
    first_moe_layer: FirstMoeLayer = None,
    api_key: ApiKey = "",
    quiet: Quiet = False,
) -> None:
    """Record a running vLLM without the plugin: send it prompts, and count the experts of its answers.

    vllm serve MODEL --enable-return-routed-experts --enable-prompt-tokens-details

    ep-rebalance record http://localhost:8000 --prompts prompts.txt -o load.eptrace
    """
    from ep_rebalance.commands import recording

    options = recording.RecordOptions(
        url=url,
        prompts=prompts,
        output=output,
        max_tokens=max_tokens,
        concurrency=concurrency,
        tokens_per_snapshot=tokens_per_snapshot,
        steps_per_snapshot=steps_per_snapshot,
        model=model,
        experts=experts,
        first_moe_layer=first_moe_layer,
        api_key=api_key,
        quiet=quiet,
    )
    recording.record(options)
