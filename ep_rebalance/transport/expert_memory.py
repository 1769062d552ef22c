"""The weights of this rank's slots as bytes.

One expert of one layer is *packed* as its tensors' bytes one after another, each padded to
`ALIGNMENT`. Nothing else knows how an engine lays an expert out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNMENT = 16


class ExpertMemory:
    """Read and write packed experts in the engine's own parameter storage.

    tensors_per_layer: for each MoE layer the tensors of all local experts; each is contiguous with
    the local slot as its first dimension. Raises ValueError for a tensor that is not.
    """

    def __init__(self, tensors_per_layer: Sequence[Sequence[torch.Tensor]]) -> None:
        self.slots = tensors_per_layer[0][0].shape[0]
        self._layers = [[_slot_bytes(t, self.slots) for t in layer] for layer in tensors_per_layer]
        self._extents = [_extents(layer) for layer in self._layers]
        self.expert_bytes_L = tuple(extents[-1][1] for extents in self._extents)
        self.device = tensors_per_layer[0][0].device

    def read(self, layer: int, slot: int, start: int, out: torch.Tensor) -> None:
        """Copy packed bytes `start..start+len(out)` of a local slot into `out` (uint8)."""
        for tensor, first, low, high in self._pieces(layer, start, start + out.numel()):
            source = tensor[slot]
            valid = min(high, first + source.numel())
            if low < valid:
                out[low - start : valid - start].copy_(source[low - first : valid - first])

    def write(self, layer: int, slot: int, packed: torch.Tensor) -> None:
        """Copy a whole packed expert (uint8) into a local slot, in stream order."""
        for tensor, (first, _) in zip(self._layers[layer], self._extents[layer], strict=True):
            destination = tensor[slot]
            destination.copy_(packed[first : first + destination.numel()])

    def checksum(self, layer: int, slot: int) -> torch.Tensor:
        """int64 [1] on the device: a position-dependent sum over the expert's bytes in its slot."""
        return _checksum([tensor[slot] for tensor in self._layers[layer]])

    def checksum_packed(self, layer: int, packed: torch.Tensor) -> torch.Tensor:
        """The same sum over a packed expert; equal if and only if (but for 64-bit chance) the bytes
        are.
        """
        parts = [
            packed[first : first + tensor.shape[1]]
            for tensor, (first, _) in zip(self._layers[layer], self._extents[layer], strict=True)
        ]
        return _checksum(parts)

    def _pieces(
        self, layer: int, start: int, stop: int
    ) -> list[tuple[torch.Tensor, int, int, int]]:
        pieces = []
        for tensor, (first, last) in zip(self._layers[layer], self._extents[layer], strict=True):
            low, high = max(start, first), min(stop, last)
            if low < high:
                pieces.append((tensor, first, low, high))
        return pieces


def _slot_bytes(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    if tensor.shape[0] != slots or not tensor.is_contiguous():
        raise ValueError(
            f"an expert tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not "
            f"contiguous with {slots} local experts in its first dimension"
        )
    return tensor.detach().reshape(slots, -1).view(torch.uint8)


def _extents(layer: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    extents, position = [], 0
    for tensor in layer:
        padded = -(-tensor.shape[1] // ALIGNMENT) * ALIGNMENT
        extents.append((position, position + padded))
        position += padded
    return extents


_COLUMNS = 1024


def _checksum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Wrapping sum of the words, the n-th times `2 n + 1`.

    Words of 32 bits, factors below 2**31, a sum of 64: no change of one word and no exchange of two
    cancels.
    """
    total = torch.zeros(1, dtype=torch.int64, device=parts[0].device)
    position = 0
    for part in parts:
        words = _words(part)
        total += _weighted_sum(words, position)
        position += words.numel()
    return total


def _words(part: torch.Tensor) -> torch.Tensor:
    """The same words wherever the bytes lie; a part that does not begin at a word is copied."""
    if part.numel() % 4:
        return part
    return (part if part.storage_offset() % 4 == 0 else part.clone()).view(torch.int32)


def _weighted_sum(words: torch.Tensor, position: int) -> torch.Tensor:
    """Sum of word n times `2 (position + n) + 1`, from column and row sums, which are small."""
    whole = words.numel() // _COLUMNS * _COLUMNS
    grid, tail = words[:whole].view(-1, _COLUMNS), words[whole:]
    columns, rows = grid.sum(0, dtype=torch.int64), grid.sum(1, dtype=torch.int64)
    row_numbers = torch.arange(rows.numel(), device=words.device)
    return (
        (columns * _factors(columns, position)).sum()
        + 2 * _COLUMNS * (rows * row_numbers).sum()
        + (tail * _factors(tail, position + whole)).sum()
    )


def _factors(like: torch.Tensor, position: int) -> torch.Tensor:
    return 2 * torch.arange(position, position + like.numel(), device=like.device) + 1
