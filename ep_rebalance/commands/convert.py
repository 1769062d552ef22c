"""`ep-rebalance convert`: recordings of other engines into traces, placements for other engines."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.progress import track

from ep_rebalance.commands.scenarios import explained
from ep_rebalance.formats import sglang, tensorrt_llm, token_ids, vllm_ascend
from ep_rebalance.formats.load import ForeignLoad, FormatError, read_text, sampled, write_trace
from ep_rebalance.load.state import SavedState, read_state, save_state
from ep_rebalance.load.trace import SUFFIX, RecordedPlacement, TraceReader
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.placement import Placement


class Target(StrEnum):
    """Who is to read a placement."""

    SGLANG = sglang.NAME
    TENSORRT_LLM = tensorrt_llm.NAME
    VLLM_ASCEND = vllm_ascend.NAME
    STATE = "state"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A recording: SGLang's logical_count JSON or .pt, TensorRT-LLM's folder of statistics, or "
            "expert ids by token (.npz, .npy). Or "
            "a placement: our state file, a trace (its last one), SGLang's, TensorRT-LLM's or "
            "vllm-ascend's."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="A trace (*.eptrace), or a placement's file.")],
    to: Annotated[
        Target | None, typer.Option(help="Whose placement to write, unless TARGET is a trace.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts of a token, where the file does not tell.")
    ] = None,
    model: Annotated[str, typer.Option(help="Name for the trace. [default: the file's]")] = "",
    phase: Annotated[
        str, typer.Option(help="Whose tokens they are: prefill or decode.")
    ] = "prefill",
    tokens_per_snapshot: Annotated[
        int,
        typer.Option(min=1, help="Tokens of a snapshot, where they come one by one or are drawn."),
    ] = 4096,
    sample: Annotated[
        int, typer.Option(min=0, help="Draw that many snapshots from the sum of the recording.")
    ] = 0,
    steps_per_snapshot: Annotated[
        int, typer.Option(min=1, help="Engine steps that a snapshot is to stand for.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    key: Annotated[str, typer.Option(help="Arrays of an .npz to take, e.g. 'math|*'.")] = "*",
    ep_size: Annotated[
        int | None, typer.Option(min=1, help="EP ranks of a placement whose file does not tell.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the model, dense ones included (SGLang).")
    ] = None,
    first_moe_layer: Annotated[
        int, typer.Option(min=0, help="The model's number of the first layer with experts.")
    ] = 0,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A state file of the server that is to read the one written by --to state."
        ),
    ] = None,
) -> None:
    """Recordings of other engines into traces, and placements for other engines.

    ep-rebalance convert logical_count.json load.eptrace --top-k 8 --sample 200
    ep-rebalance convert state.npz location.json --to sglang --first-moe-layer 3 --layers 61
    """
    with explained():
        if phase not in PHASES:
            raise ValueError(f"--phase {phase}: it is one of {', '.join(PHASES)}")
        if target.suffix == SUFFIX:
            load, known = _read_load(source, tokens_per_snapshot, key, top_k)
            if sample:
                load = sampled(
                    load, snapshots=sample, tokens=tokens_per_snapshot, top_k=known, seed=seed
                )
            count = write_trace(
                _shown(load, sample),
                target,
                model=model or source.stem,
                top_k=known,
                phase=phase,
                steps_per_snapshot=steps_per_snapshot,
            )
            typer.echo(f"{target}: {count} snapshots, {load.origin}", err=True)
            return
        if to is None:
            raise ValueError(f"TARGET {target} is no *{SUFFIX}; say whose placement with --to")
        placement, moe_layers = _read_placement(source, ep_size, first_moe_layer)
        write_placement(target, placement, moe_layers, to, layers=layers, like=like)


def _read_load(
    source: Path, tokens_per_snapshot: int, key: str, top_k: int | None
) -> tuple[ForeignLoad, int]:
    """The load and its top-k."""
    if source.is_dir():
        return tensorrt_llm.read_load(source)
    if source.suffix in (".npz", ".npy"):
        return token_ids.read_load(source, tokens_per_snapshot=tokens_per_snapshot, keys=key)
    load = sglang.read_load(source)
    sizes = (load.layers, load.experts)
    guessed = [s.top_k for s in SHAPES.values() if (s.layers, s.experts) == sizes]
    if top_k is None and not guessed:
        raise FormatError(source, "", "does not tell the experts of a token; give --top-k")
    return load, top_k or guessed[0]


def _shown(load: ForeignLoad, total: int) -> ForeignLoad:
    """With a progress bar; `total` 0 if it is not known."""
    counts = track(load.counts, "writing", total=total or None, transient=True)
    return dataclasses.replace(load, counts=counts)


def _read_placement(
    source: Path, ep_size: int | None, first: int
) -> tuple[Placement, tuple[int, ...]]:
    """The placement and the model's numbers of its layers, from `first` on where they are not told."""
    if source.suffix in (".yaml", ".yml"):
        return tensorrt_llm.read_placement(source, _ranks(source, ep_size))
    if source.suffix == ".json":
        if '"device_expert"' in read_text(source):
            return vllm_ascend.read_placement(source)
        placement = sglang.read_placement(source, _ranks(source, ep_size))
    elif source.suffix == SUFFIX:
        changes = [r for r in TraceReader(source) if isinstance(r, RecordedPlacement)]
        placement = changes[-1].placement
    else:
        placement = read_state(source).placement
    return placement, tuple(range(first, first + placement.num_layers))


def _ranks(source: Path, ep_size: int | None) -> int:
    if ep_size is None:
        raise FormatError(source, "", "does not tell the ranks; give --ep-size")
    return ep_size


def _placement_text(
    placement: Placement, moe_layers: tuple[int, ...], to: Target, layers: int | None
) -> str:
    if to == Target.TENSORRT_LLM:
        return tensorrt_llm.placement_text(placement, moe_layers)
    if to == Target.VLLM_ASCEND:
        return vllm_ascend.placement_text(placement, moe_layers)
    least = moe_layers[-1] + 1
    if layers is not None and layers < least:
        raise ValueError(f"--layers {layers}: the placement reaches layer {least - 1}")
    return sglang.placement_text(placement, moe_layers, layers or least)


def write_placement(
    target: Path,
    placement: Placement,
    moe_layers: tuple[int, ...],
    to: Target,
    *,
    layers: int | None,
    like: Path | None,
) -> None:
    """In the form of `to`, and say so on stderr. layers: of the model, for SGLang. like: a state file
    whose model the placement is for. Raises ValueError for what does not fit."""
    if to == Target.STATE:
        save_state(target, _state(placement, like))
    else:
        _write(target, _placement_text(placement, moe_layers, to, layers))
    typer.echo(
        f"{target}: {placement.num_layers} layers, {placement.num_slots} slots on "
        f"{placement.num_ranks} ranks, for {to.value}",
        err=True,
    )


def _state(placement: Placement, like: Path | None) -> SavedState:
    """A generation later than that of `like`, with its model and its load."""
    if like is None:
        raise ValueError("a state file names its model: give --like, one that the server has saved")
    saved = read_state(like)
    theirs = saved.placement
    sizes = (placement.slots_LP.shape, placement.num_experts, placement.num_ranks)
    if sizes != (theirs.slots_LP.shape, theirs.num_experts, theirs.num_ranks):
        raise ValueError(f"{like} is for {theirs.slots_LP.shape} layers and slots, not {sizes[0]}")
    header = msgspec.structs.replace(saved.header, generation=saved.header.generation + 1)
    return SavedState(
        header=header,
        placement=placement,
        quotas_LP=placement.even_quotas_LP(),
        load_LE=saved.load_LE,
    )


def _write(path: Path, text: str) -> None:
    """At once or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
