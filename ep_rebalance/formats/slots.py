"""Slots of a file as a placement, also where ranks hold an expert twice, as EPLB's algorithm may place it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.contents import FormatError
from ep_rebalance.placement import Placement, PlacementError, RepeatingPlacement


def placement_of(path: Path, place: str, slots_LP: NDArray[Any], num_ranks: int) -> Placement:
    """The placement with these slots: a `RepeatingPlacement` if only repeats keep it from being one.

    place: where the slots lie in the file.
    slots_LP: whole numbers [L, P].

    Raises FormatError for what no engine could serve.
    """
    if slots_LP.shape[1] % num_ranks:
        reason = f"has {slots_LP.shape[1]} slots, which {num_ranks} ranks cannot share evenly"
        raise FormatError(path, place, f"{reason}; give the --ep-size that it is for")
    experts = int(slots_LP.max()) + 1
    try:
        return Placement(slots_LP, experts, num_ranks)
    except PlacementError as error:
        try:
            return RepeatingPlacement(slots_LP, experts, num_ranks)
        except PlacementError:
            reason = f"{error}; `ep-rebalance plan` makes one in which none is missing"
            raise FormatError(path, place, reason) from None


def told_repeats(placement: Placement) -> str:
    """Which experts lie on a rank more than once, a sentence for users; "" if there are none."""
    if not isinstance(placement, RepeatingPlacement):
        return ""
    by_rank = (placement.num_layers, placement.num_ranks, placement.slots_per_rank)
    sorted_LRS = np.sort(placement.slots_LP.reshape(by_rank), axis=2)
    twice_N3 = np.argwhere(sorted_LRS[:, :, 1:] == sorted_LRS[:, :, :-1])
    if not twice_N3.size:
        return "some experts have more replicas than this plugin serves; `ep-rebalance plan` bounds them"
    layer, rank, slot = twice_N3[0]
    return (
        f"{len(twice_N3)} of {placement.slots_LP.size} slots repeat an expert of their rank, which spreads "
        f"no load: the first is expert {sorted_LRS[layer, rank, slot]} on rank {rank} in row {layer}. EPLB's "
        "algorithm makes such maps; `ep-rebalance plan` makes one without"
    )
