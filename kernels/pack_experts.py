"""Gather one expert's tensors into one run of bytes, scatter such a run into a slot, and sum it up.

A *slab* is what one slot holds of one tensor. Packed, an expert is its slabs one after another, each
padded to ALIGNMENT. The checksum is the wrapping 64-bit sum of the words, the n-th times `2 n + 1`:
words of 32 bits, factors below 2**31, so that no change of one word and no exchange of two cancels.
The kernel copies and sums in the same pass, all slabs in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_rebalance.kernels.language import jit, runs_triton, tl, triton

ALIGNMENT = 16
"""Bytes: what the GPU reads at once."""

BLOCK = 4096
"""Words that a program copies."""

WARPS = 8
_COLUMNS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Slabs:
    """All slots' experts of one layer as bytes.

    tensors: uint8 [S, bytes of a slot]. firsts: where each one's slab begins in a packed expert.
    packed_bytes: of a packed expert. table: int64 [tensors, 3] on the device, of each its address, its
    size in a slot and where its slab begins in a packed expert, in units of ALIGNMENT; None if slabs
    do not begin at its multiples, which only the torch form can read.
    """

    tensors: tuple[torch.Tensor, ...]
    firsts: tuple[int, ...]
    packed_bytes: int
    table: torch.Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Slabs:
        """tensors: uint8 [S, bytes], contiguous; they must stay where they are."""
        firsts, position = [], 0
        for tensor in tensors:
            firsts.append(position)
            position += -(-tensor.shape[1] // ALIGNMENT) * ALIGNMENT
        return cls(
            tensors=tuple(tensors),
            firsts=tuple(firsts),
            packed_bytes=position,
            table=_table(tensors, firsts),
        )

    @property
    def kind(self) -> tuple[bool, tuple[int, ...]]:
        """What the launches on one layer depend on: whether a kernel reads it, and its sizes."""
        return self.table is not None, tuple(tensor.shape[1] for tensor in self.tensors)


def _table(tensors: Sequence[torch.Tensor], firsts: Sequence[int]) -> torch.Tensor | None:
    aligned = all(
        tensor.shape[1] % ALIGNMENT == 0 and tensor.data_ptr() % ALIGNMENT == 0
        for tensor in tensors
    )
    if not aligned:
        return None
    rows = [
        [bytes_ // ALIGNMENT for bytes_ in (tensor.data_ptr(), tensor.shape[1], first)]
        for tensor, first in zip(tensors, firsts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


def pack_expert(
    slabs: Slabs,
    slot: int,
    start: int,
    out: torch.Tensor,
    checksum: torch.Tensor | None = None,
) -> None:
    """Copy packed bytes `start .. start + len(out)` of a slot into `out` (uint8); padding is not
    written. checksum: int64 [1], set to the whole expert's; read in the same pass if `out` is all of it.
    """
    if not _runs_kernel(slabs, out) or start % ALIGNMENT or len(out) % ALIGNMENT:
        pack_expert_torch(slabs, slot, start, out, checksum)
    elif checksum is None or len(out) == slabs.packed_bytes:
        _launch(slabs, slot, start, out, checksum, from_slot=True, copies=True)
    else:
        _launch(slabs, slot, start, out, None, from_slot=True, copies=True)
        _launch(slabs, slot, 0, None, checksum, from_slot=True, copies=False)


def pack_expert_torch(
    slabs: Slabs,
    slot: int,
    start: int,
    out: torch.Tensor,
    checksum: torch.Tensor | None = None,
) -> None:
    """Reference of `pack_expert`."""
    stop = start + out.numel()
    for tensor, first in zip(slabs.tensors, slabs.firsts, strict=True):
        slab = tensor[slot]
        low, high = max(start, first), min(stop, first + slab.numel())
        if low < high:
            out[low - start : high - start].copy_(slab[low - first : high - first])
    if checksum is not None:
        checksum.copy_(_checksum([tensor[slot] for tensor in slabs.tensors]))


def unpack_expert(slabs: Slabs, slot: int, packed: torch.Tensor) -> None:
    """Copy a packed expert (uint8, may be longer) into a slot, in stream order."""
    if _runs_kernel(slabs, packed):
        _launch(slabs, slot, 0, packed, None, from_slot=False, copies=True)
    else:
        unpack_expert_torch(slabs, slot, packed)


def unpack_expert_torch(slabs: Slabs, slot: int, packed: torch.Tensor) -> None:
    """Reference of `unpack_expert`."""
    for tensor, part in zip(slabs.tensors, _parts(slabs, packed), strict=True):
        tensor[slot].copy_(part)


def packed_checksum(slabs: Slabs, packed: torch.Tensor, checksum: torch.Tensor) -> None:
    """Set `checksum` (int64 [1]) to that of a packed expert (uint8, may be longer)."""
    if _runs_kernel(slabs, packed):
        _launch(slabs, 0, 0, packed, checksum, from_slot=False, copies=False)
    else:
        checksum.copy_(_checksum(_parts(slabs, packed)))


def warm_up(slabs: Slabs, packed: torch.Tensor) -> None:
    """Compile and load all that the functions above launch; slots keep their bytes.

    packed: uint8, room for a packed expert; zeros afterwards.
    """
    whole = packed[: slabs.packed_bytes]
    checksum = torch.zeros(1, dtype=torch.int64, device=packed.device)
    pack_expert(slabs, 0, 0, whole[:ALIGNMENT], checksum)
    pack_expert(slabs, 0, 0, whole, checksum)
    packed_checksum(slabs, whole, checksum)
    unpack_expert(slabs, 0, whole)
    packed.zero_()


def _runs_kernel(slabs: Slabs, packed: torch.Tensor) -> bool:
    aligned = packed.data_ptr() % ALIGNMENT == 0
    return slabs.table is not None and aligned and runs_triton(packed)


def _parts(slabs: Slabs, packed: torch.Tensor) -> list[torch.Tensor]:
    return [
        packed[first : first + tensor.shape[1]]
        for tensor, first in zip(slabs.tensors, slabs.firsts, strict=True)
    ]


def _checksum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Reference of the checksum, of an expert's slabs without padding."""
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


@jit(
    do_not_specialize=["slot", "start_unit", "stop_unit"],
    do_not_specialize_on_alignment=["checksum_ptr"],
)
def _kernel(
    table_ptr,
    packed_ptr,
    checksum_ptr,
    slot,
    start_unit,
    stop_unit,
    FROM_SLOT: tl.constexpr,
    COPIES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, t) takes block i of slab t. A word's number in the checksum leaves padding out, and
    slabs that this kernel takes have none. What begins or ends is counted in units of 16 bytes, so that
    the compiler knows without any value that a thread may take as much at once.
    """
    start_word, stop_word = 4 * start_unit, 4 * stop_unit
    entry = table_ptr + 3 * tl.program_id(1)
    units = tl.load(entry + 1)
    words = 4 * units
    first = 4 * tl.load(entry + 2)
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = first + word
    wanted = (word < words) & (number >= start_word) & (number < stop_word)
    address = 16 * (tl.load(entry) + slot * units)
    slab_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + word
    if FROM_SLOT:
        value = tl.load(slab_ptr, mask=wanted, other=0)
        if COPIES:
            tl.store(packed_ptr + (number - start_word), value, mask=wanted)
    else:
        value = tl.load(packed_ptr + (number - start_word), mask=wanted, other=0)
        if COPIES:
            tl.store(slab_ptr, value, mask=wanted)
    if SUMS:
        tl.atomic_add(checksum_ptr, tl.sum(value.to(tl.int64) * (2 * number + 1)))


def _launch(
    slabs: Slabs,
    slot: int,
    start: int,
    packed: torch.Tensor | None,
    checksum: torch.Tensor | None,
    *,
    from_slot: bool,
    copies: bool,
) -> None:
    assert slabs.table is not None
    stop = slabs.packed_bytes
    if packed is not None:
        stop = min(stop, start + len(packed))
        packed = packed[: stop - start].view(torch.int32)
    if checksum is not None:
        checksum.zero_()
    longest = max(tensor.shape[1] for tensor in slabs.tensors) // 4
    _kernel[(triton.cdiv(longest, BLOCK), len(slabs.tensors))](
        slabs.table,
        packed,
        checksum,
        slot,
        start // ALIGNMENT,
        stop // ALIGNMENT,
        FROM_SLOT=from_slot,
        COPIES=copies,
        SUMS=checksum is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
