"""What `ep-rebalance convert` does: reads a file, and writes a trace, or a placement for another engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from rich.progress import Progress

from ep_rebalance.checkpoint import numbers_of, read_checkpoint
from ep_rebalance.commands.output import say
from ep_rebalance.commands.scenarios import explained
from ep_rebalance.formats import AXES, conversion
from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading, Writing
from ep_rebalance.formats.load import ForeignLoad, sampled, write_trace
from ep_rebalance.formats.slots import told_repeats
from ep_rebalance.load.trace import SUFFIX
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What the options of `ep-rebalance convert` say; `convert.py` explains them."""

    source: Path
    target: Path
    to: str | None
    top_k: int | None
    model: str
    phase: str
    tokens_per_snapshot: int
    sample: int
    steps_per_snapshot: int
    seed: int
    key: str
    experts: int | None
    axes: str
    ep_size: int | None
    layers: int | None
    first_moe_layer: int | None
    like: Path | None


def convert(options: ConvertOptions) -> None:
    """Write the target and say so on stderr. Exits with 2 for what the user can put right."""
    with explained():
        if options.phase not in PHASES:
            raise ValueError(f"--phase {options.phase} is not one of {', '.join(PHASES)}")
        check_axes(options.axes)
        reading = Reading(
            num_ranks=options.ep_size,
            first_moe_layer=options.first_moe_layer,
            tokens_per_snapshot=options.tokens_per_snapshot,
            keys=options.key,
            axes=options.axes,
            experts=experts_of(options.model, options.experts),
        )
        if options.target.suffix == SUFFIX:
            _write_trace(options, reading)
            return
        if options.to is None:
            raise ValueError(
                f"TARGET {options.target} is not a *{SUFFIX}; say for which engine it is with --to"
            )
        placement, moe_layers = conversion.read_placement(options.source, reading)
        tell(filter(None, [told_repeats(placement)]))
        writing = Writing(layers=options.layers, like=options.like)
        write_placement(options.target, placement, moe_layers, options.to, writing)


def _write_trace(options: ConvertOptions, reading: Reading) -> None:
    source, target, sample = options.source, options.target, options.sample
    load, known = _load(
        source, reading, options.top_k, options.model, snapshots=sample, seed=options.seed
    )
    tell(load.notes)
    with _shown(load, sample) as shown:
        count = write_trace(
            shown,
            target,
            source=source,
            model=options.model or source.name.split(".")[0],
            top_k=known,
            phase=options.phase,
            steps_per_snapshot=options.steps_per_snapshot,
        )
    say(f"{target}: {count} snapshots, {load.origin}")


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
        say(f"ep-rebalance: note: {note}")


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
    load = conversion.read_load(source, reading)
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
    to: the format, one that `choices.TARGETS` takes.
    """
    if placement.num_slots % placement.num_ranks:
        raise ValueError(
            f"{placement.num_slots} slots do not divide by {placement.num_ranks} ranks, and no engine starts "
            f"with such a placement; `ep-rebalance plan TRACE --redundant "
            f"{-placement.num_slots % placement.num_ranks}` makes one with as many slots on every rank"
        )
    conversion.write_placement(target, placement, moe_layers, to, writing)
    say(
        f"{target}: {placement.num_layers} layers, {placement.num_slots} slots on "
        f"{placement.num_ranks} ranks, for {to}"
    )
