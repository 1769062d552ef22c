"""Counts of layers and experts: which rows are layers with experts, and which numbers these have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading, told
from ep_rebalance.formats.load import ForeignLoad, counts_of


def load_of_counts(
    path: Path, place: str, value: Any, reading: Reading, origin: str
) -> ForeignLoad:
    """A recording whose rows are all layers of the model, or all its layers with experts.

    place: where `value` lies in the file.
    value: as `counts_of` takes it. Rows without tokens in any snapshot are layers without experts. If there
        are some, the places of the others are their numbers in the model.

    Raises FormatError for what cannot be counts, and what contradicts `reading`.
    """
    counts_WLE = counts_of(path, place, value)
    layers, experts = counts_WLE.shape[1:]
    reading.check_experts(path, place, experts)
    moe_layers, notes = layers_with_experts(
        path, place, np.asarray(counts_WLE.any(axis=(0, 2))), reading
    )
    kept = moe_layers if len(moe_layers) < layers else None
    return ForeignLoad(
        counts=list(counts_WLE if kept is None else counts_WLE[:, kept]),
        layers=len(moe_layers),
        experts=experts,
        moe_layers=reading.numbers_of(path, len(moe_layers), kept or ()),
        origin=origin,
        notes=notes,
    )


def layers_with_experts(
    path: Path, place: str, used_L: Any, reading: Reading
) -> tuple[list[int], tuple[str, ...]]:
    """(places of the layers with experts, notes on the others).

    used_L: bool [L], whether a layer has tokens.

    Raises FormatError if there are none.
    """
    used = np.flatnonzero(used_L).tolist()
    unused = np.flatnonzero(~used_L).tolist()
    if not used:
        raise FormatError(
            path, place, "has no layer with tokens; record while the server has traffic"
        )
    if not unused:
        return used, ()
    note = (
        f"layers {told(unused)} have no tokens and are left out, as layers without experts; "
        f"the others keep their numbers, {told(used)}"
    )
    if unused[-1] > used[-1]:
        note += f"; SGLang's file of the placement needs --layers {len(used_L)}"
    return used, (note,)
