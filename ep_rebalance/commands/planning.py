"""What `ep-rebalance plan` does: finds the best placement for recorded load, and writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from ep_rebalance.commands.converting import tell, write_placement
from ep_rebalance.commands.scenarios import explained, settings_for
from ep_rebalance.formats.format import Reading, Writing
from ep_rebalance.load.history import LoadHistory
from ep_rebalance.load.trace import Record, RecordedSnapshot, read_records
from ep_rebalance.load.window import WindowLoad, window_load
from ep_rebalance.offline.expert_size import completed
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.run import NothingRecorded, contiguous_placement
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.placement import Placement, imbalance_L

_NUMBERED = (
    "the trace does not number its layers, so they are taken for 0 to {last} of the model; if its first "
    "layers have no experts, give --first-moe-layer"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the options of `ep-rebalance plan` say; `plan.py` explains them."""

    traces: Sequence[Path]
    output: Path
    to: str
    ep_size: int | None
    redundant: int | None
    ranks_per_node: int | None
    layers: int | None
    first_moe_layer: int | None
    like: Path | None


def plan(options: PlanOptions) -> None:
    """Write the placement, and say on stderr what it gains. Exits with 2 for what the user can put right."""
    with explained():
        readers = open_traces(options.traces)
        head = completed(readers[0].head)
        ranks = options.ep_size or head.ep_size
        if ranks < 2:
            raise ValueError("the trace was converted and has no ranks: give --ep-size, e.g. 8")
        copies = head.slots - head.experts if options.redundant is None else options.redundant
        settings = settings_for(readers[0], None, [])
        reading = Reading(first_moe_layer=options.first_moe_layer)
        # Before the planner's work, so that a contradiction is told at once.
        if not reading.numbers_of(options.traces[0], head.layers, head.moe_layers):
            tell([_NUMBERED.format(last=head.layers - 1)])
        one = scenario(head, settings, "static", ranks, copies, options.ranks_per_node)
        contiguous = contiguous_placement(head, one)
        load = _remembered(read_records(readers))
        placement = place_anew(load, contiguous, one.topology)
        _, moe_layers = reading.numbered(options.traces[0], placement, head.moe_layers)
        writing = Writing(layers=options.layers, like=options.like)
        write_placement(options.output, placement, moe_layers, options.to, writing)
        typer.echo(
            f"imbalance on this load: {_imbalance(contiguous, load):.3f} contiguous, "
            f"{_imbalance(placement, load):.3f} placed",
            err=True,
        )


def _remembered(records: Iterable[Record]) -> WindowLoad:
    """The trace as a few kinds of load, of which old ones count less. Raises NothingRecorded."""
    memory, last = LoadHistory(), None
    for record in records:
        if isinstance(record, RecordedSnapshot) and record.counts_ALE.any():
            last = window_load([record.sample()])
            memory.add(last)
    if last is None:
        raise NothingRecorded("the trace holds no snapshot with tokens; record while it serves")
    # The last snapshot is in the memory, too. On its own it gets the rest, since no share may be 1.
    return memory.joined(last, 0.99)


def _imbalance(placement: Placement, load: WindowLoad) -> float:
    """Max over mean rank load of all of it, averaged over layers."""
    return float(imbalance_L(placement.rank_load_LR(load.load_LE)).mean())
