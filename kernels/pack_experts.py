"""Gather one expert's tensors into one run of bytes, scatter such a run into a slot, and sum it up.

A *slab* is what one slot holds of one tensor: any number of bytes at any address. Packed, an expert is
its slabs one after another, each padded to ALIGNMENT. The checksum is the wrapping 64-bit sum of the
packed expert's words, the n-th times `2 n + 1`, padding taken as zeros: words of 32 bits, factors below
2**31, so that no change of one word and no exchange of two cancels. The kernel copies and sums in the
same pass, all slabs in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.kernels.language import jit, runs_triton, tl

ALIGNMENT = 16
"""Bytes: what the GPU reads at once."""

BLOCK = 4096
"""Words that a program copies."""

BLOCK_BYTES = 1024
"""Bytes that a program copies where there are no aligned words; fewer than words, since each byte takes
a register as a word does.
"""

WARPS = 8
WORD = 4
SMALL = 1 << 14
"""Bytes of a slab up to which the reference takes longer for its operations than for the bytes."""

_COLUMNS = 1024
_PIECE = 256 * _COLUMNS
"""Words that the reference sums at once: what it makes of them stays in a CPU's cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slabs:
    """All slots' experts of one layer as bytes.

    tensors: uint8 [S, bytes of a slab]; the bytes of a slab lie one after another.
    firsts: where each one's slab begins in a packed expert, multiples of ALIGNMENT.
    packed_bytes: of a packed expert.
    blocks_B5: int64 [B, 5] on the device, a row for each program: address in slot 0, bytes from slot to
        slot, where its part begins in a packed expert, units of ALIGNMENT that it copies as words, and
        bytes that it copies one by one; one of the last two is 0.
    block_firsts_B: int64 [B], the third column on the host, ascending.
    small_factors_N: int64 [N] on the device, of each word of the slabs that are SMALL, one slab after
        another, its factor in the checksum.
    """

    tensors: tuple[torch.Tensor, ...]
    firsts: tuple[int, ...]
    packed_bytes: int
    blocks_B5: torch.Tensor
    block_firsts_B: NDArray[np.int64]
    small_factors_N: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Slabs:
        """tensors: uint8 [S, bytes] with stride 1 in the last dimension; they must stay where they are."""
        firsts, position = [], 0
        for tensor in tensors:
            firsts.append(position)
            position += -(-tensor.shape[1] // ALIGNMENT) * ALIGNMENT
        blocks_B5 = np.concatenate(
            [_blocks(tensor, first) for tensor, first in zip(tensors, firsts, strict=True)]
        )
        return cls(
            tensors=tuple(tensors),
            firsts=tuple(firsts),
            packed_bytes=position,
            blocks_B5=torch.from_numpy(blocks_B5).to(tensors[0].device),
            block_firsts_B=blocks_B5[:, 2],
            small_factors_N=_small_factors(tensors, firsts).to(tensors[0].device),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each slab."""
        return tuple(tensor.shape[1] for tensor in self.tensors)


def _blocks(tensor: torch.Tensor, first: int) -> NDArray[np.int64]:
    """One slab's rows of `blocks_B5`. Words if every slot's slab is aligned as its packed form is; what
    is left behind them, and all of any other slab, byte by byte.
    """
    address, stride, size = tensor.data_ptr(), tensor.stride(0), tensor.shape[1]
    in_words = 0 if (address | stride) % ALIGNMENT else size // ALIGNMENT * ALIGNMENT
    begin_B = np.concatenate(
        (np.arange(0, in_words, WORD * BLOCK), np.arange(in_words, size, BLOCK_BYTES))
    )
    bytes_B = np.diff(begin_B, append=size)
    units_B = np.where(begin_B < in_words, bytes_B // ALIGNMENT, 0)
    return np.stack(
        (
            address + begin_B,
            np.full_like(begin_B, stride),
            first + begin_B,
            units_B,
            np.where(units_B > 0, 0, bytes_B),
        ),
        axis=1,
    )


def _small_factors(tensors: Sequence[torch.Tensor], firsts: Sequence[int]) -> torch.Tensor:
    numbers = [
        first // WORD + torch.arange(-(-tensor.shape[1] // WORD))
        for tensor, first in zip(tensors, firsts, strict=True)
        if tensor.shape[1] <= SMALL
    ]
    return 2 * torch.cat([torch.empty(0, dtype=torch.int64), *numbers]) + 1


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
    if not _runs_kernel(out) or start % ALIGNMENT or len(out) % ALIGNMENT:
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
        checksum.copy_(_checksum(slabs, [tensor[slot] for tensor in slabs.tensors]))


def unpack_expert(slabs: Slabs, slot: int, packed: torch.Tensor) -> None:
    """Copy a packed expert (uint8, may be longer) into a slot, in stream order."""
    if _runs_kernel(packed):
        _launch(slabs, slot, 0, packed, None, from_slot=False, copies=True)
    else:
        unpack_expert_torch(slabs, slot, packed)


def unpack_expert_torch(slabs: Slabs, slot: int, packed: torch.Tensor) -> None:
    """Reference of `unpack_expert`."""
    for tensor, part in zip(slabs.tensors, _parts(slabs, packed), strict=True):
        tensor[slot].copy_(part)


def packed_checksum(slabs: Slabs, packed: torch.Tensor, checksum: torch.Tensor) -> None:
    """Set `checksum` (int64 [1]) to that of a packed expert (uint8, may be longer)."""
    if _runs_kernel(packed):
        _launch(slabs, 0, 0, packed, checksum, from_slot=False, copies=False)
    else:
        packed_checksum_torch(slabs, packed, checksum)


def packed_checksum_torch(slabs: Slabs, packed: torch.Tensor, checksum: torch.Tensor) -> None:
    """Reference of `packed_checksum`."""
    checksum.copy_(_checksum(slabs, _parts(slabs, packed)))


def add_checksum(slabs: Slabs, slot: int, start: int, stop: int, checksum: torch.Tensor) -> None:
    """Add to `checksum` (int64 [1]) what packed bytes `start .. stop` of a slot have in its expert's.

    start, stop: multiples of ALIGNMENT.
    """
    if runs_triton(checksum):
        _run(slabs, slot, (start, stop), None, checksum, from_slot=True, copies=False)
    else:
        add_checksum_torch(slabs, slot, start, stop, checksum)


def add_checksum_torch(
    slabs: Slabs, slot: int, start: int, stop: int, checksum: torch.Tensor
) -> None:
    """Reference of `add_checksum`."""
    for tensor, first in zip(slabs.tensors, slabs.firsts, strict=True):
        low, high = max(start, first), min(stop, first + tensor.shape[1])
        if low < high:
            words = _words(tensor[slot, low - first : high - first])
            for position in range(0, words.numel(), _PIECE):
                piece = words[position : position + _PIECE]
                checksum += _weighted_sum(piece, low // WORD + position)


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


def _runs_kernel(packed: torch.Tensor) -> bool:
    return packed.data_ptr() % ALIGNMENT == 0 and runs_triton(packed)


def _parts(slabs: Slabs, packed: torch.Tensor) -> list[torch.Tensor]:
    return [
        packed[first : first + tensor.shape[1]]
        for tensor, first in zip(slabs.tensors, slabs.firsts, strict=True)
    ]


def _checksum(slabs: Slabs, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Reference of the checksum, of an expert's slabs without padding. Small ones are summed together,
    since each sum of its own takes as many operations as another.
    """
    total = torch.zeros(1, dtype=torch.int64, device=parts[0].device)
    small = [part for part in parts if part.numel() <= SMALL]
    if small:
        total += (torch.cat([_words(part) for part in small]) * slabs.small_factors_N).sum()
    for part, first in zip(parts, slabs.firsts, strict=True):
        words = _words(part) if part.numel() > SMALL else part[:0]
        for position in range(0, words.numel(), _PIECE):
            piece = words[position : position + _PIECE]
            total += _weighted_sum(piece, first // WORD + position)
    return total


def _words(part: torch.Tensor) -> torch.Tensor:
    """The same words wherever the bytes lie: those that do not begin and end at a word are copied, and
    the last word is filled with zeros.
    """
    missing = -part.numel() % WORD
    if missing or part.storage_offset() % WORD:
        part = torch.cat((part, part.new_zeros(missing)))
    return part.view(torch.int32)


def _weighted_sum(words: torch.Tensor, position: int) -> torch.Tensor:
    """Sum of word n times `2 (position + n) + 1`, from column and row sums, which are small."""
    whole = words.numel() // _COLUMNS * _COLUMNS
    tail = words[whole:]
    grid = words[:whole].view(-1, _COLUMNS)
    columns, rows = grid.sum(0, dtype=torch.int64), grid.sum(1, dtype=torch.int64)
    row_numbers = torch.arange(rows.numel(), device=words.device)
    total = (columns * _factors(columns, position)).sum()
    total += 2 * _COLUMNS * (rows * row_numbers).sum()
    if tail.numel():
        total += (tail * _factors(tail, position + whole)).sum()
    return total


def _factors(like: torch.Tensor, position: int) -> torch.Tensor:
    return 2 * torch.arange(position, position + like.numel(), device=like.device) + 1


@jit(
    do_not_specialize=["first_block", "slot", "start_unit", "stop_unit"],
    do_not_specialize_on_alignment=["checksum_ptr"],
)
def _kernel(
    blocks_ptr,
    packed_ptr,
    checksum_ptr,
    first_block,
    slot,
    start_unit,
    stop_unit,
    FROM_SLOT: tl.constexpr,
    COPIES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Program i takes block `first_block + i`. What begins or ends is counted in units of 16 bytes, so
    that the compiler knows without any value that a thread may take as much at once.
    """
    row = blocks_ptr + 5 * (first_block + tl.program_id(0))
    address = tl.load(row) + slot * tl.load(row + 1)
    first = tl.load(row + 2)
    units = tl.load(row + 3)
    if units > 0:
        lane = tl.arange(0, BLOCK)
        number = 4 * (first // 16) + lane
        wanted = (lane < 4 * units) & (number >= 4 * start_unit) & (number < 4 * stop_unit)
        words = _copied(
            tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + lane,
            packed_ptr,
            number - 4 * start_unit,
            wanted,
            FROM_SLOT,
            COPIES,
        )
        if SUMS:
            tl.atomic_add(checksum_ptr, tl.sum(words.to(tl.int64) * (2 * number + 1)))
    else:
        byte = tl.arange(0, BLOCK_BYTES)
        place = first + byte
        inside = (byte < tl.load(row + 4)) & (place >= 16 * start_unit) & (place < 16 * stop_unit)
        characters = _copied(
            address.to(tl.pointer_type(tl.int8)) + byte,
            None if packed_ptr is None else packed_ptr.to(tl.pointer_type(tl.int8)),
            place - 16 * start_unit,
            inside,
            FROM_SLOT,
            COPIES,
        )
        if SUMS:
            # A word is its bytes times 1, 2**8, 2**16 and 2**24, of which the last has the sign.
            part = characters.to(tl.int64)
            part = tl.where(byte % 4 == 3, part, part & 255) << (8 * (byte % 4))
            tl.atomic_add(checksum_ptr, tl.sum(part * (2 * (place // 4) + 1)))


@jit
def _copied(slab_ptr, packed_ptr, position, wanted, FROM_SLOT: tl.constexpr, COPIES: tl.constexpr):
    """What is wanted of a block, after its copy to the other side."""
    if FROM_SLOT:
        value = tl.load(slab_ptr, mask=wanted, other=0)
        if COPIES:
            tl.store(packed_ptr + position, value, mask=wanted)
    else:
        value = tl.load(packed_ptr + position, mask=wanted, other=0)
        if COPIES:
            tl.store(slab_ptr, value, mask=wanted)
    return value


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
    stop = slabs.packed_bytes
    if packed is not None:
        stop = min(stop, start + len(packed))
        packed = packed[: stop - start].view(torch.int32)
    if checksum is not None:
        checksum.zero_()
    _run(slabs, slot, (start, stop), packed, checksum, from_slot=from_slot, copies=copies)


def _run(
    slabs: Slabs,
    slot: int,
    part: tuple[int, int],
    packed: torch.Tensor | None,
    checksum: torch.Tensor | None,
    *,
    from_slot: bool,
    copies: bool,
) -> None:
    """Copy, and add to `checksum`, what lies in this part of a packed expert."""
    start, stop = part
    if start >= stop:
        return
    first_block = int(np.searchsorted(slabs.block_firsts_B, start, side="right")) - 1
    last_block = int(np.searchsorted(slabs.block_firsts_B, stop))
    _kernel[(last_block - first_block,)](
        slabs.blocks_B5,
        packed,
        checksum,
        first_block,
        slot,
        start // ALIGNMENT,
        stop // ALIGNMENT,
        FROM_SLOT=from_slot,
        COPIES=copies,
        SUMS=checksum is not None,
        BLOCK=BLOCK,
        BLOCK_BYTES=BLOCK_BYTES,
        num_warps=WARPS,
    )
