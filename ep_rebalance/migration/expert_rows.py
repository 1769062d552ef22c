"""Tensors of experts as rows of bytes, one for each local slot, wherever an engine laid them.

A tensor may be permuted, column-major or padded: it has a row for each expert if the experts are its
outermost dimension in memory, and none reaches into the next one's. Padding within a row moves along. The
rows of a storage that holds nothing else are as long as its experts are apart; any other row ends where
its expert's last element does, since what follows may be another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch

LayerTensors = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
"""What holds the experts of one layer, by name or without."""


def rows_of_layers(layers: Sequence[LayerTensors], slots: int) -> list[list[torch.Tensor]]:
    """For each layer uint8 [S, bytes] views of its tensors, in their order. Tensors that share bytes are
    taken once, in the place of the first; empty ones are left out.

    slots: local ones. Raises ValueError for what cannot be seen as rows, or moved without harm to others.
    """
    rows_of_L = [_rows_of_layer(layer, number, slots) for number, layer in enumerate(layers)]
    everything = [rows for layer in rows_of_L for rows in layer]
    _refuse_several_devices(everything)
    _refuse_overlaps(everything)
    return [[rows.view() for rows in layer] for layer in rows_of_L]


def _rows_of_layer(layer: LayerTensors, number: int, slots: int) -> list[_Rows]:
    rows = [
        _Rows.of(order, name, tensor, slots)
        for order, (name, tensor) in enumerate(_named(layer, number))
        if tensor.numel()
    ]
    if not rows:
        raise ValueError(f"experts cannot be moved: layer {number} has no tensor that holds them")
    return _united(rows)


def _named(layer: LayerTensors, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(layer, Mapping):
        yield from ((f"{name} of layer {number}", tensor) for name, tensor in layer.items())
    else:
        yield from ((f"tensor {n} of layer {number}", tensor) for n, tensor in enumerate(layer))


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of one tensor, or of several that share bytes.

    order: of the tensor in its layer, or of the first one.
    name: of that tensor.
    storage: that all are views of.
    slots: how many rows.
    first: bytes of the storage before the first row.
    size: bytes of a row.
    step: bytes from one to the next.
    """

    order: int
    name: str
    storage: torch.UntypedStorage
    slots: int
    first: int
    size: int
    step: int

    @classmethod
    def of(cls, order: int, name: str, tensor: torch.Tensor, slots: int) -> _Rows:
        if tensor.layout is not torch.strided:
            raise _refusal(name, tensor, f"its layout is {tensor.layout}, not strided")
        storage = tensor.untyped_storage()
        size, step = _row_and_step(name, tensor, slots)
        first = tensor.storage_offset() * tensor.element_size()
        if storage.nbytes() == slots * step:
            first, size = 0, step
        return cls(order, name, storage, slots, first, size, step)

    @property
    def start(self) -> int:
        """Address of the first row."""
        return int(self.storage.data_ptr()) + self.first

    @property
    def stop(self) -> int:
        """Address behind the last row."""
        return self.start + (self.slots - 1) * self.step + self.size

    def view(self) -> torch.Tensor:
        """uint8 [S, size]."""
        rows = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return rows.set_(self.storage, self.first, (self.slots, self.size), (self.step, 1))

    def meets(self, other: _Rows) -> bool:
        """Whether any row of the one has a byte of any row of the other. On device meta there are none."""
        if not self.storage.data_ptr():
            return False
        if self.stop <= other.start or other.stop <= self.start:
            return False
        if self.step != other.step:
            return True
        apart = (other.start - self.start) % self.step
        return apart < self.size or apart + other.size > self.step

    def extended(self, other: _Rows) -> _Rows | None:
        """Rows of both, if they share bytes slot by slot; None if they do not."""
        if self.storage.data_ptr() != other.storage.data_ptr() or self.step != other.step:
            return None
        first = min(self.first, other.first)
        end = max(self.first + self.size, other.first + other.size)
        if not self.meets(other) or end - first > self.step:
            return None
        named = min(self, other, key=attrgetter("order"))
        storage = max(self.storage, other.storage, key=lambda storage: storage.nbytes())
        return replace(named, storage=storage, first=first, size=end - first)


def _row_and_step(name: str, tensor: torch.Tensor, slots: int) -> tuple[int, int]:
    """Bytes from an expert's first element to behind its last, and to the next expert's first."""
    axes = list(zip(tensor.shape, tensor.stride(), strict=True))
    counting = [axis for axis, (size, _) in enumerate(axes) if size == slots]
    if not counting:
        raise _refusal(
            name,
            tensor,
            f"it does not divide into {slots} local experts: no dimension has their number",
        )
    # Where several dimensions have their number, the first one is theirs, as engines lay them out.
    axis = 0 if counting[0] == 0 else max(counting, key=tensor.stride)
    _, stride = axes.pop(axis)
    item = tensor.element_size()
    row = item * (1 + sum((size - 1) * stride for size, stride in axes))
    if slots == 1:
        return row, row
    if any(other > stride for size, other in axes if size > 1):
        raise _refusal(
            name,
            tensor,
            f"the stride of its {slots} local experts, in dimension {axis}, is not the largest, so that an "
            "expert is no block of bytes; lay them out one after another",
        )
    if row > item * stride:
        raise _refusal(
            name,
            tensor,
            f"its experts overlap: one is {row} bytes long and the next begins {item * stride} bytes on; "
            "give each memory of its own",
        )
    return row, item * stride


def _united(layer: Sequence[_Rows]) -> list[_Rows]:
    """Rows that share bytes are one, in the place of the first."""
    united: list[_Rows] = []
    for rows in sorted(layer, key=attrgetter("start")):
        both = united[-1].extended(rows) if united else None
        united[len(united) - (both is not None) :] = [both or rows]
    return sorted(united, key=attrgetter("order"))


def _refuse_several_devices(all_rows: Sequence[_Rows]) -> None:
    first = all_rows[0]
    for rows in all_rows:
        if rows.storage.device != first.storage.device:
            raise ValueError(
                f"experts cannot be moved: {rows.name} is on {rows.storage.device} and {first.name} on "
                f"{first.storage.device}; put them on one device"
            )


def _refuse_overlaps(all_rows: Sequence[_Rows]) -> None:
    before: list[_Rows] = []
    for rows in sorted(all_rows, key=attrgetter("start")):
        before = [other for other in before if other.stop > rows.start]
        for other in before:
            if other.meets(rows):
                raise ValueError(
                    f"experts cannot be moved: {other.name} and {rows.name} share memory, but not expert by "
                    "expert of one layer, so that a move of the one would change the other; give each "
                    "memory of its own"
                )
        before.append(rows)


def _refusal(name: str, tensor: torch.Tensor, reason: str) -> ValueError:
    return ValueError(
        f"experts cannot be moved: {name}, of shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride() if tensor.layout is torch.strided else None}: {reason}"
    )
