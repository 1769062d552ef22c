"""Group (token, expert) pairs by the slot that computes them, each group in blocks of equal size.

This does for the slots of one rank, in one launch, what takes two in vLLM's `moe_align_block_size`
(csrc/moe/moe_align_sum_kernels.cu). Every program counts all pairs and then places those of one slot,
so that nothing needs to be cleared first and no program waits for another. Pairs keep their order.

    row of a pair = first row of its slot + number of earlier pairs of the same slot
    first row of slot s = block_rows * sum over slots s' < s of ceil(pairs of s' / block_rows)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_rebalance.kernels.language import jit, runs_triton, tl, triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """N pairs in blocks of `block_rows` rows; all rows of a block are for one slot.

    pair_of_row: int32 [blocks * block_rows]. The pair that a row computes; N in rows that only fill up a
        block.
    slot_of_block: int32 [blocks]. The slot of each block, counted from 0 on this rank.
    num_blocks: int32 [1]. How many blocks are used; the content of the others is undefined.
    """

    pair_of_row: torch.Tensor
    slot_of_block: torch.Tensor
    num_blocks: torch.Tensor
    block_rows: int
    num_pairs: int


def max_blocks(num_pairs: int, num_slots: int, block_rows: int) -> int:
    """The most blocks that any routing needs: each slot leaves at most one block partly filled."""
    return num_pairs // block_rows + min(num_slots, num_pairs)


def group_tokens(
    slots_N: torch.Tensor, *, num_slots: int, block_rows: int, first_slot: int = 0
) -> Groups:
    """Group the pairs of the `num_slots` slots from `first_slot` on; all others are left out.

    slots_N: integer, of any shape. The slot of each pair; pair `n` is the n-th element.
    block_rows: a power of two.
    """
    if torch.compiler.is_compiling():
        tensors = _operation(slots_N, num_slots, block_rows, first_slot)
    elif runs_triton(slots_N):
        tensors = _launch(slots_N, num_slots, block_rows, first_slot)
    else:
        return group_tokens_torch(
            slots_N, num_slots=num_slots, block_rows=block_rows, first_slot=first_slot
        )
    return groups_of(*tensors, block_rows=block_rows, num_pairs=slots_N.numel())


def groups_of(
    pair_of_row: torch.Tensor,
    slot_of_block: torch.Tensor,
    num_blocks: torch.Tensor,
    *,
    block_rows: int,
    num_pairs: int,
) -> Groups:
    """The three tensors under their names."""
    return Groups(
        pair_of_row=pair_of_row,
        slot_of_block=slot_of_block,
        num_blocks=num_blocks,
        block_rows=block_rows,
        num_pairs=num_pairs,
    )


def group_tokens_torch(
    slots_N: torch.Tensor, *, num_slots: int, block_rows: int, first_slot: int = 0
) -> Groups:
    """The reference for `group_tokens`."""
    local_N = slots_N.reshape(-1).long() - first_slot
    num_pairs = local_N.numel()
    here = ((local_N >= 0) & (local_N < num_slots)).nonzero().squeeze(1)
    order = here[local_N[here].argsort(stable=True)]
    counts_S = torch.bincount(local_N[here], minlength=num_slots)
    blocks_S = (counts_S + block_rows - 1) // block_rows
    slot_of_row = local_N[order]
    first_row_S = (blocks_S.cumsum(0) - blocks_S) * block_rows
    first_pair_S = counts_S.cumsum(0) - counts_S
    row = torch.arange(len(order), device=order.device) - first_pair_S[slot_of_row]
    blocks = max_blocks(num_pairs, num_slots, block_rows)
    pair_of_row = torch.full((blocks * block_rows,), num_pairs, device=order.device)
    pair_of_row[first_row_S[slot_of_row] + row] = order
    slot_of_block = torch.zeros(blocks, dtype=torch.int32, device=order.device)
    used = torch.arange(num_slots, device=order.device).repeat_interleave(blocks_S)
    slot_of_block[: len(used)] = used.int()
    return groups_of(
        pair_of_row.int(),
        slot_of_block,
        blocks_S.sum().int().view(1),
        block_rows=block_rows,
        num_pairs=num_pairs,
    )


@torch.library.custom_op("ep_rebalance::group_tokens", mutates_args=())
def _operation(
    slots_N: torch.Tensor, num_slots: int, block_rows: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`group_tokens` for torch.compile: pair_of_row, slot_of_block, num_blocks."""
    groups = group_tokens(
        slots_N, num_slots=num_slots, block_rows=block_rows, first_slot=first_slot
    )
    return groups.pair_of_row, groups.slot_of_block, groups.num_blocks


@_operation.register_fake
def _(
    slots_N: torch.Tensor, num_slots: int, block_rows: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = max_blocks(slots_N.numel(), num_slots, block_rows)
    sizes = (blocks * block_rows, blocks, 1)
    pair_of_row, slot_of_block, num_blocks = (
        slots_N.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return pair_of_row, slot_of_block, num_blocks


@jit
def _kernel(
    slots_ptr,
    pair_of_row_ptr,
    slot_of_block_ptr,
    num_blocks_ptr,
    num_pairs,
    num_slots,
    first_slot,
    BINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program `s` places the pairs of slot `s`.

    BINS: a power of two, more than `num_slots`.
    """
    slot = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + lane
        local = tl.load(slots_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32) - first_slot
        here = (pair < num_pairs) & (local >= 0) & (local < num_slots)
        count += tl.histogram(tl.where(here, local, 0), BINS, mask=here)
    blocks = (count + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_block = tl.sum(tl.where(bins < slot, blocks, 0))
    own_blocks = tl.sum(tl.where(bins == slot, blocks, 0))
    if slot == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks))

    first_row = first_block * BLOCK_ROWS
    placed = 0
    for start in range(0, num_pairs, CHUNK):
        pair = start + lane
        local = tl.load(slots_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32) - first_slot
        mine = (pair < num_pairs) & (local == slot)
        # `before` includes the pair itself, hence the - 1 below.
        before = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(pair_of_row_ptr + first_row + placed + before - 1, pair, mask=mine)
        placed += tl.sum(mine.to(tl.int32))

    filler = placed + tl.arange(0, BLOCK_ROWS)
    padding = tl.zeros([BLOCK_ROWS], tl.int32) + num_pairs
    tl.store(pair_of_row_ptr + first_row + filler, padding, mask=filler < own_blocks * BLOCK_ROWS)
    for start in range(0, own_blocks, CHUNK):
        block = start + lane
        value = tl.zeros([CHUNK], tl.int32) + slot
        tl.store(slot_of_block_ptr + first_block + block, value, mask=block < own_blocks)


def options(num_pairs: int) -> dict[str, int]:
    """CHUNK, which is how many pairs a program looks at in one go, and the warps of a launch."""
    chunk = min(4096, max(128, 1 << (num_pairs - 1).bit_length()))
    return {"CHUNK": chunk, "num_warps": 8 if num_pairs > 1024 else 4}


def _launch(
    slots_N: torch.Tensor, num_slots: int, block_rows: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_pairs = slots_N.numel()
    blocks = max_blocks(num_pairs, num_slots, block_rows)
    pair_of_row = slots_N.new_empty(blocks * block_rows, dtype=torch.int32)
    slot_of_block = slots_N.new_empty(blocks, dtype=torch.int32)
    num_blocks = slots_N.new_empty(1, dtype=torch.int32)
    _kernel[(num_slots,)](
        slots_N.contiguous(),
        pair_of_row,
        slot_of_block,
        num_blocks,
        num_pairs,
        num_slots,
        first_slot,
        BINS=triton.next_power_of_2(num_slots + 1),
        BLOCK_ROWS=block_rows,
        **options(num_pairs),
    )
    return pair_of_row, slot_of_block, num_blocks
