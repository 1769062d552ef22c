"""Counts of layers and experts: which rows are layers with experts, and which numbers these have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    moe_layers, notes = layers_with_experts(path, place, np.asarray(counts_WLE.any(axis=(0, 2))))
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
    path: Path, place: str, used_L: NDArray[np.bool_], numbers: Sequence[int] = ()
) -> tuple[list[int], tuple[str, ...]]:
    """(places of the layers with experts, notes on the others).

    used_L: whether a layer has tokens.
    numbers: of the layers; () if their places are their numbers.

    Raises FormatError if there are none.
    """
    used, unused = np.flatnonzero(used_L).tolist(), np.flatnonzero(~used_L).tolist()
    if not used:
        reason = "has no layer with tokens; record while the server has traffic"
        raise FormatError(path, place, reason)
    if not unused:
        return used, ()
    names = numbers or range(len(used_L))
    note = (
        f"layers {told([names[layer] for layer in unused])} have no tokens and are left out, as layers "
        f"without experts; the others keep their numbers, {told([names[layer] for layer in used])}"
    )
    if unused[-1] > used[-1]:
        note += f"; SGLang's file of the placement needs --layers {names[unused[-1]] + 1}"
    return used, (note,)
