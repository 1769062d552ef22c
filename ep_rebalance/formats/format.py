"""What readers and writers of all formats are told, and what they have in common."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ep_rebalance.formats.contents import FormatError
from ep_rebalance.placement import MAX_LAYERS, Placement

NumberedPlacement = tuple[Placement, tuple[int, ...]]
"""A placement, and the numbers that its layers have in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader is told, in case the file does not say it. What contradicts a file is refused.

    num_ranks: EP ranks of a placement; None if they were not given.
    first_moe_layer: the model's number of the first layer with experts; None if it was not given.
    tokens_per_snapshot: tokens. For load that comes token by token.
    keys: a pattern for the names of the arrays to read.
    axes: what the axes of arrays are, letters of `formats.AXES`; "" to guess.
    experts: logical experts of a layer; None if they were not given.
    """

    num_ranks: int | None = None
    first_moe_layer: int | None = None
    tokens_per_snapshot: int = 4096
    keys: str = "*"
    axes: str = ""
    experts: int | None = None

    def ranks_of(self, path: Path) -> int:
        """The number of ranks. Raises FormatError if it was not given."""
        if self.num_ranks is None:
            raise FormatError(path, "", "does not say how many ranks there are; give --ep-size")
        return self.num_ranks

    def numbers_of(self, path: Path, layers: int, found: Sequence[int] = ()) -> tuple[int, ...]:
        """The numbers that layers have in the model; () if neither the file nor an argument tells.

        found: those that the file tells.

        Raises FormatError if they contradict the argument, do not rise, or are beyond all models.
        """
        first = self.first_moe_layer
        if first is not None and found and found[0] != first:
            raise FormatError(
                path,
                "",
                f"numbers its layers with experts {told(found)}, which --first-moe-layer {first} "
                "contradicts; leave it out",
            )
        numbers = tuple(found)
        if not numbers and first is not None:
            numbers = tuple(range(first, first + layers))
        for before, number in pairwise((-1, *numbers)):
            if number <= before:
                raise FormatError(
                    path,
                    "",
                    f"has layer {number} behind layer {before}; number each once, from 0 on",
                )
            if number >= MAX_LAYERS:
                raise FormatError(
                    path,
                    "",
                    f"has layer {number}, and {MAX_LAYERS - 1} is the last that is read; mend it",
                )
        return numbers

    def numbered(
        self, path: Path, placement: Placement, found: Sequence[int] = ()
    ) -> NumberedPlacement:
        """A placement with the numbers of its layers: those of the file, else from `first_moe_layer` on.

        Raises FormatError as `numbers_of` does.
        """
        numbers = self.numbers_of(path, placement.num_layers, found)
        return placement, numbers or tuple(range(placement.num_layers))

    def check_experts(self, path: Path, place: str, experts: int) -> None:
        """Raises FormatError if a file has another number of experts than was given."""
        if self.experts not in (None, experts):
            reason = (
                f"has {experts} experts a layer, not the {self.experts} of --experts or --model"
            )
            raise FormatError(path, place, f"{reason}; drop that option")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What a writer is told besides the placement.

    layers: number of the model's layers, dense ones included.
    like: a state file of the model that the placement is for.
    """

    layers: int | None = None
    like: Path | None = None


def replace_text(path: Path, text: str) -> None:
    """Write a file, or replace it, atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, 0o644)  # `mkstemp` lets nobody else read it
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def told(numbers: Sequence[int]) -> str:
    """Rising numbers in a text: "3 to 60", or "1, 3, 5, 7"."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown}, ... {numbers[-1]}"
