"""`ep-rebalance convert`: turns other engines' recordings into traces, and writes placements for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.choices import TARGETS
from ep_rebalance.commands.options import FirstMoeLayer, ModelLayers
from ep_rebalance.formats import AXES, FORMATS
from ep_rebalance.offline.model_shape import SHAPES


def _sources() -> str:
    loads = ", ".join(name for name, one in FORMATS.items() if one.reads_load)
    placements = ", ".join(name for name, one in FORMATS.items() if one.reads_placement)
    meanings = "; ".join(f"{name}: {one.summary}" for name, one in FORMATS.items())
    return f"A recording ({loads}) or a placement ({placements}). {meanings}."


_Source = Annotated[Path, typer.Argument(help=_sources())]
_Target = Annotated[Path, typer.Argument(help="A trace (*.eptrace), or a file for a placement.")]
_To = Annotated[
    str | None,
    typer.Option(
        **TARGETS, help="For which engine to write a placement, unless TARGET is a trace."
    ),
]
_TopK = Annotated[
    int | None, typer.Option(min=1, help="Experts per token, if the file does not say.")
]
_Model = Annotated[
    str,
    typer.Option(
        help="Name for the trace. A folder with config.json also says how many experts there are, and so do "
        f"{', '.join(SHAPES)}.",
        show_default="the file's",
    ),
]
_Experts = Annotated[
    int | None,
    typer.Option(min=1, help="Experts of a layer, where ids and lines of CSV leave it open."),
]
_Axes = Annotated[
    str,
    typer.Option(
        help=f"What the axes of arrays are, in their order: the letters of {', '.join(AXES)} (T tokens, L "
        "layers, K top-k, E experts, W snapshots).",
        show_default="guessed if certain",
    ),
]
_Phase = Annotated[str, typer.Option(help="The phase of the tokens: prefill or decode.")]
_TokensPerSnapshot = Annotated[
    int, typer.Option(min=1, help="Tokens of a snapshot, if they are recorded one by one or drawn.")
]
_Sample = Annotated[
    int, typer.Option(min=0, help="Draw this many snapshots from the sum of the recording.")
]
_StepsPerSnapshot = Annotated[
    int, typer.Option(min=1, help="Engine steps that a snapshot is said to cover.")
]
_Seed = Annotated[int, typer.Option(help="Seed of --sample.")]
_Key = Annotated[str, typer.Option(help="Arrays of an .npz file to read, e.g. 'math|*'.")]
_EpSize = Annotated[
    int | None, typer.Option(min=1, help="EP ranks of a placement, if its file does not say.")
]
_Like = Annotated[
    Path | None,
    typer.Option(
        help="For --to state: a state file saved by the server that is to read the new one."
    ),
]


def convert(
    source: _Source,
    target: _Target,
    to: _To = None,
    top_k: _TopK = None,
    model: _Model = "",
    phase: _Phase = "prefill",
    tokens_per_snapshot: _TokensPerSnapshot = 4096,
    sample: _Sample = 0,
    steps_per_snapshot: _StepsPerSnapshot = 16,
    seed: _Seed = 0,
    key: _Key = "*",
    experts: _Experts = None,
    axes: _Axes = "",
    ep_size: _EpSize = None,
    layers: ModelLayers = None,
    first_moe_layer: FirstMoeLayer = None,
    like: _Like = None,
) -> None:
    """Turn recordings of other engines into traces, or write placements for other engines.

    ep-rebalance convert logical_count.json load.eptrace --top-k 8 --sample 200
    ep-rebalance convert state.npz location.json --to sglang --first-moe-layer 3 --layers 61
    """
    from ep_rebalance.commands import converting

    options = converting.ConvertOptions(
        source=source,
        target=target,
        to=to,
        top_k=top_k,
        model=model,
        phase=phase,
        tokens_per_snapshot=tokens_per_snapshot,
        sample=sample,
        steps_per_snapshot=steps_per_snapshot,
        seed=seed,
        key=key,
        experts=experts,
        axes=axes,
        ep_size=ep_size,
        layers=layers,
        first_moe_layer=first_moe_layer,
        like=like,
    )
    converting.convert(options)
