"""This plugin's state file (load/state.py), as a placement to start with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ep_rebalance.config import ConfigurationError
from ep_rebalance.formats.contents import FormatError, beginning
from ep_rebalance.formats.format import NumberedPlacement, Reading, Writing
from ep_rebalance.formats.slots import told_repeats
from ep_rebalance.load.state import SavedState, read_state, save_state
from ep_rebalance.placement import Placement


def recognises(path: Path) -> bool:
    """Recognises a state file by its first bytes (it is a ZIP archive), not by its name."""
    return beginning(path, 2) == b"PK"


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """The saved placement."""
    state = saved_state(path)
    return reading.numbered(path, state.placement, state.header.identity.moe_layers)


def saved_state(path: Path) -> SavedState:
    """As `read_state`, but its errors are those of a file that somebody named. Raises FormatError."""
    try:
        return read_state(path)
    except ConfigurationError as error:
        reason = error.reason.rstrip(".").removeprefix(f"the state file {str(path)!r} ")
        raise FormatError(path, "", f"{reason}; name another file") from None


def write_placement(
    path: Path, placement: Placement, moe_layers: Sequence[int], writing: Writing
) -> None:
    """Write a state file, which does not number its layers. Raises ValueError without a `writing.like` that
    fits.
    """
    save_state(path, _state(placement, writing.like))


def _state(placement: Placement, like: Path | None) -> SavedState:
    """The model and load of `like` with another placement, as its next generation."""
    if like is None:
        raise ValueError("a state file names its model: give --like, one that the server has saved")
    if told_repeats(placement):
        raise ValueError(
            "a state file holds no placement in which a rank has an expert twice; `ep-rebalance plan` makes "
            "one without"
        )
    saved = saved_state(like)
    theirs = saved.placement
    sizes = (placement.slots_LP.shape, placement.num_experts, placement.num_ranks)
    if sizes != (theirs.slots_LP.shape, theirs.num_experts, theirs.num_ranks):
        raise ValueError(
            f"{like} is for {_told(theirs)}, the placement for {_told(placement)}; give --like a state file "
            "saved with these sizes"
        )
    header = msgspec.structs.replace(saved.header, generation=saved.header.generation + 1)
    return SavedState(
        header=header,
        placement=placement,
        quotas_LP=placement.even_quotas_LP(),
        load_LE=saved.load_LE,
    )


def _told(placement: Placement) -> str:
    return (
        f"{placement.num_layers} layers, {placement.num_slots} slots, {placement.num_ranks} ranks"
    )
