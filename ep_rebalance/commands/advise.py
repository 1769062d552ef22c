"""`ep-rebalance advise`: how to serve the recorded load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.options import (
    AsJson,
    ExpertBytes,
    HiddenSize,
    OptionalTraces,
    Quiet,
    RecordedModel,
)
from ep_rebalance.offline.hardware_table import hardware_names

_DEFAULT_GPUS = (8, 16, 32)
_DEFAULT_REDUNDANT = (0, 1, 2)

_Hardware = Annotated[
    str | None,
    typer.Option(
        help=f"Accelerator: {', '.join(hardware_names())}, or a YAML file of its figures.",
        show_default="none; required without --measure",
    ),
]
_Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Measure this machine instead: memory bandwidth, a matrix product, links. What cannot be "
        "measured here is taken from --hardware.",
    ),
]
_Gpus = Annotated[
    list[int] | None,
    typer.Option(
        min=2, help="GPUs. Repeat for several.", show_default=", ".join(map(str, _DEFAULT_GPUS))
    ),
]
_Redundant = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        help="Redundant experts on each GPU. Repeat for several.",
        show_default=", ".join(map(str, _DEFAULT_REDUNDANT)),
    ),
]
_Memory = Annotated[
    float | None, typer.Option(min=1, help="Memory of a GPU in GB.", show_default="the hardware's")
]
_GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs on a node.")]
_TokensPerGpu = Annotated[
    float | None,
    typer.Option(min=1, help="Tokens of a step on each GPU.", show_default="as recorded"),
]
_Config = Annotated[
    Path | None, typer.Option(help="Settings of the plugin.", show_default="the recorded server's")
]
_Jobs = Annotated[int | None, typer.Option(min=1, help="Replays to run at the same time.")]


def advise(
    traces: OptionalTraces = None,
    hardware: _Hardware = None,
    measure: _Measure = False,
    model: RecordedModel = None,
    expert_bytes: ExpertBytes = None,
    hidden_size: HiddenSize = None,
    gpus: _Gpus = None,
    redundant: _Redundant = None,
    memory: _Memory = None,
    gpus_per_node: _GpusPerNode = 8,
    tokens_per_gpu: _TokensPerGpu = None,
    config: _Config = None,
    jobs: _Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Is there anything to gain from moving experts, and how should this load be served?

      ep-rebalance advise load.eptrace --hardware h100-sxm --gpus 8 --gpus 16

    Says first whether ranks are uneven and whether that lasts, then ranks numbers of GPUs and of redundant
    experts, and experts cut over all GPUs. Each answer says how it was come by. Step times are modelled from
    the hardware's figures, not measured: trust the ranking more than the numbers.
    """
    from ep_rebalance.commands import advising

    options = advising.AdviseOptions(
        traces=traces or [],
        hardware=hardware,
        measure=measure,
        model=model,
        expert_bytes=expert_bytes,
        hidden_size=hidden_size,
        gpus=gpus or _DEFAULT_GPUS,
        redundant=redundant or _DEFAULT_REDUNDANT,
        memory=memory,
        gpus_per_node=gpus_per_node,
        tokens_per_gpu=tokens_per_gpu,
        config=config,
        jobs=jobs,
        as_json=as_json,
        quiet=quiet,
    )
    advising.advise(options)
