"""Arguments and options that several commands take.

`show_default` describes defaults that are worked out, since Rich takes brackets in a help text for markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Traces = Annotated[list[Path], typer.Argument(help="Trace files (*.eptrace), or folders of them.")]
OptionalTraces = Annotated[
    list[Path] | None,
    typer.Argument(help="Trace files (*.eptrace), or folders of them.", show_default=False),
]
"""For commands that say themselves where a trace comes from."""

RanksPerNode = Annotated[
    int | None,
    typer.Option(min=1, help="EP ranks on a node.", show_default="as recorded, else 8"),
]
ModelLayers = Annotated[
    int | None, typer.Option(min=1, help="Layers of the model, dense ones included (SGLang).")
]
FirstMoeLayer = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="The model's number of the first layer with experts, where the file does not say.",
        show_default="the file's, else 0",
    ),
]
RecordedModel = Annotated[
    str | None,
    typer.Option(
        help="The recorded model: a folder, its config.json, a cached name, or a known one such as "
        "deepseek-v3. Tells how large an expert is.",
        show_default="as recorded, else a known model",
    ),
]
ExpertBytes = Annotated[
    int | None,
    typer.Option(min=1, help="Bytes of one expert of one layer.", show_default="the model's"),
]
HiddenSize = Annotated[
    int | None,
    typer.Option(min=1, help="Numbers in a token between layers.", show_default="the model's"),
]
ApiKey = Annotated[str, typer.Option(envvar="VLLM_API_KEY", help="The server's API key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
