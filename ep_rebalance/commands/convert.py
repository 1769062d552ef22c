"""`ep-rebalance convert`: turns other engines' recordings into traces, and writes placements for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ep_rebalance.checkpoint import numbers_of, read_checkpoint
from ep_rebalance.commands.choices import one_of
from ep_rebalance.commands.options import FirstMoeLayer, ModelLayers
from ep_rebalance.commands.scenarios import explained
from ep_rebalance.formats import FORMATS, read_load, read_placement
from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import AXES, Reading, Writing
from ep_rebalance.formats.load import ForeignLoad, sampled, write_trace
from ep_rebalance.formats.slots import told_repeats
from ep_rebalance.load.trace import SUFFIX
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.placement import Placement

TARGETS = one_of(name for name, one in FORMATS.items() if one.write_placement)
"""Arguments of an option that says which engine is to read a placement."""


def _sources() -> str:
    loads = ", ".join(name for name, one in FORMATS.items() if one.read_load)
    placements = ", ".join(name for name, one in FORMATS.items() if one.read_placement)
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
    with explained():
        if phase not in PHASES:
            raise ValueError(f"--phase {phase} is not one of {', '.join(PHASES)}")
        check_axes(axes)
        reading = Reading(
            num_ranks=ep_size,
            first_moe_layer=first_moe_layer,
            tokens_per_snapshot=tokens_per_snapshot,
            keys=key,
            axes=axes,
            experts=experts_of(model, experts),
        )
        if target.suffix == SUFFIX:
            load, known = _load(source, reading, top_k, model, snapshots=sample, seed=seed)
            tell(load.notes)
            with _shown(load, sample) as shown:
                count = write_trace(
                    shown,
                    target,
                    source=source,
                    model=model or source.name.split(".")[0],
                    top_k=known,
                    phase=phase,
                    steps_per_snapshot=steps_per_snapshot,
                )
            typer.echo(f"{target}: {count} snapshots, {load.origin}", err=True)
            return
        if to is None:
            raise ValueError(
                f"TARGET {target} is not a *{SUFFIX}; say for which engine it is with --to"
            )
        placement, moe_layers = read_placement(source, reading)
        tell(filter(None, [told_repeats(placement)]))
        write_placement(target, placement, moe_layers, to, Writing(layers=layers, like=like))


def check_axes(axes: str) -> None:
    """Raises ValueError for what names no axes of an array."""
    if axes and axes not in {"".join(order) for word in AXES for order in permutations(word)}:
        raise ValueError(
            f"--axes {axes} is no order of the letters {', '.join(AXES)}; write e.g. --axes TLK"
        )


def experts_of(model: str, given: int | None) -> int | None:
    """Experts of a layer: the given number, else that of a model. Raises ValueError if both differ."""
    told = _told(model).experts
    if given is not None and told not in (None, given):
        raise ValueError(f"--experts {given}: {model} has {told}; leave out one of both")
    return told if given is None else given


def tell(notes: Iterable[str]) -> None:
    """Say on stderr what was left out or taken for granted."""
    for note in notes:
        typer.echo(f"ep-rebalance: note: {note}", err=True)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a model's name says; None where it does not."""

    experts: int | None = None
    top_k: int | None = None


def _told(model: str) -> _Told:
    """Of a known model, or of a checkpoint's files. Raises ConfigurationError if these cannot be read."""
    for name, shape in SHAPES.items():
        if model.lower() in (name, shape.title.lower()):
            return _Told(shape.experts, shape.top_k)
    if model and Path(model).exists():
        numbers = numbers_of(read_checkpoint(model).config)
        return _Told(numbers.experts or None, numbers.top_k)
    return _Told()


def _load(
    source: Path, reading: Reading, top_k: int | None, model: str, *, snapshots: int, seed: int
) -> tuple[ForeignLoad, int]:
    """(recording, top-k). With `snapshots`, that many are drawn from the recording's sum."""
    load = read_load(source, reading)
    known = _top_k(source, load, top_k, model)
    if not snapshots:
        return load, known
    tokens = reading.tokens_per_snapshot
    return sampled(load, snapshots=snapshots, tokens=tokens, top_k=known, seed=seed), known


def _top_k(source: Path, load: ForeignLoad, given: int | None, model: str) -> int:
    """The top-k that the file holds, else the given one, else that of a known model with these sizes."""
    given, sizes = given or _told(model).top_k, (load.layers, load.experts)
    if None not in (load.top_k, given) and load.top_k != given:
        raise FormatError(
            source, "", f"has {load.top_k} experts for each token, not {given}; leave out --top-k"
        )
    guessed = [s.top_k for s in SHAPES.values() if (s.layers, s.experts) == sizes]
    known = [top_k for top_k in (load.top_k, given, *guessed) if top_k is not None]
    if not known:
        raise FormatError(source, "", "does not say how many experts a token has; give --top-k")
    return known[0]


@contextmanager
def _shown(load: ForeignLoad, total: int) -> Iterator[ForeignLoad]:
    """The same load with a progress bar, of unknown length if `total` is 0.

    The bar ends here, also if not all of the load is taken: left to the garbage collector, Rich's
    generator waits for its thread, which may wait for whoever was interrupted.
    """
    with Progress(transient=True) as progress:
        counts = progress.track(load.counts, total or None, description="writing")
        yield dataclasses.replace(load, counts=counts)


def write_placement(
    target: Path, placement: Placement, moe_layers: Sequence[int], to: str, writing: Writing
) -> None:
    """Write a placement and say so on stderr. Raises ValueError for what does not fit, and for ranks with
    unequally many slots, which no engine starts with.

    moe_layers: the numbers that the placement's layers have in the model.
    to: the format, one of TARGETS.
    """
    write = FORMATS[to].write_placement
    assert write is not None
    if placement.num_slots % placement.num_ranks:
        raise ValueError(
            f"{placement.num_slots} slots do not divide by {placement.num_ranks} ranks, and no engine starts "
            f"with such a placement; `ep-rebalance plan TRACE --redundant "
            f"{-placement.num_slots % placement.num_ranks}` makes one with as many slots on every rank"
        )
    write(target, placement, moe_layers, writing)
    typer.echo(
        f"{target}: {placement.num_layers} layers, {placement.num_slots} slots on "
        f"{placement.num_ranks} ranks, for {to}",
        err=True,
    )
