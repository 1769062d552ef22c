"""Send a step's tokens to slots so that this source's own tokens load all ranks alike.

Quotas are fitted to the load of recent steps; a step's own tokens deviate from it. Here a layer's tokens
are counted as they come, and those of replicated experts are poured over their ranks like water
(`planning/quotas.py` does it for the load of a window). If each source loads all ranks alike, so do all
of them together, and nothing has to be sent for it. Ranks that are far from a source may stand on higher
ground, so that less is poured there: what one source sends further, another sends back.

All arithmetic is on whole sixteenths of a token, so that every form of it gives the same bits, and ranks
that route the same tokens send them to the same slots.

Letters of this module: `X` experts that are poured, `B` blocks of (token, expert) pairs; others as in
`placement.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_rebalance.kernels.language import jit, runs_triton, tl, triton
from ep_rebalance.kernels.route_and_count import LayerTables, count_torch, route_torch
from ep_rebalance.kernels.shared_arithmetic import (
    HASH_STEP,
    IGNORED,
    MOST_REPLICAS,
    MOST_SWEEPS,
    RANKS_PER_PAIR,
    UNIT_BITS,
    Ranks,
)

BLOCK = 512
"""(token, expert) pairs of one program."""
POUR_OPTIONS = {"BLOCK": BLOCK, "COMPARED": 16, "num_warps": 8}
"""A program's pairs are compared with so many of them at once."""


@dataclass(frozen=True, slots=True)
class PourTables:
    """The order in which one layer's experts are poured. Only ever written in place.

    Experts of one colour share no rank, so that they are poured at the same time.

    poured_X: int32 [X]. Experts with replicas, colour after colour; -1 for no expert.
    colour_X: int32 [X]. From 0; -1 for no expert.
    row_E: int32 [E]. Where each expert is in the others; -1 for those that are split by their quotas.
    ground_R: int32 [R]. How much higher than the lowest each rank stands, in 1/65536 of the step's (token,
        expert) pairs; 0 for all if only evenness counts.
    """

    poured_X: torch.Tensor
    colour_X: torch.Tensor
    row_E: torch.Tensor
    ground_R: torch.Tensor


def route_by_own_counts(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    tables: LayerTables,
    pours: PourTables,
    offset: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    """[T, K], of the dtype of `topk_ids_TK`: the slot for each expert of each token, which is counted.

    Arguments, counts and what becomes of padding as in `route_and_count`. Of an expert's n tokens replica
    `j` gets the next floor(x_0 + ... + x_j + u) - floor(x_0 + ... + x_(j-1) + u), where x sums to n and u,
    from 0 to 1, comes from `offset`, the expert and the source: rounding favours no replica for long. x is
    poured, from what the thresholds give, until ranks are level, their ground included. Experts without a
    row go by the thresholds, and so do all of them in a step of very few tokens.
    """
    if runs_triton(topk_ids_TK):
        slots_TK = torch.empty_like(topk_ids_TK, memory_format=torch.contiguous_format)
        _launch(topk_ids_TK.contiguous(), phase_T, tables, pours, offset, ranks, slots_TK)
        return slots_TK
    return route_by_own_counts_torch(topk_ids_TK, phase_T, tables, pours, offset, ranks)


def route_by_own_counts_torch(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    tables: LayerTables,
    pours: PourTables,
    offset: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    """The reference for `route_by_own_counts`."""
    count_torch(topk_ids_TK, phase_T, tables.counts_AE)
    by_quota_TK = route_torch(topk_ids_TK, tables, offset)
    num_experts, num_replicas = tables.replica_slots_EC.shape
    ids = topk_ids_TK.reshape(-1).long()
    known = (ids >= 0) & (ids < num_experts)
    bounds_XC = bounds_torch(
        torch.bincount(ids[known], minlength=num_experts), tables, pours, offset, ranks
    )
    poured = known & (known.sum() * RANKS_PER_PAIR >= ranks.total)
    rows = torch.where(poured, pours.row_E[ids.clamp(0, num_experts - 1)].long(), -1)
    passed = bounds_XC[rows.clamp(min=0)] <= _positions(ids).unsqueeze(1)
    choice = passed.sum(1, keepdim=True).clamp(max=num_replicas - 1)
    slots = tables.replica_slots_EC[ids.clamp(0, num_experts - 1)].gather(1, choice).squeeze(1)
    poured_TK = slots.to(topk_ids_TK.dtype).view(topk_ids_TK.shape)
    return torch.where(rows.view(topk_ids_TK.shape) >= 0, poured_TK, by_quota_TK)


def bounds_torch(
    tokens_E: torch.Tensor,
    tables: LayerTables,
    pours: PourTables,
    offset: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    """int64 [X, C]: replica `j` of a poured expert gets its tokens from bounds[j - 1] to bounds[j].

    tokens_E: int64 [E]. This step's.
    """
    poured_X, slots_EC = pours.poured_X.long(), tables.replica_slots_EC.long()
    shares_EC = torch.diff(
        tables.thresholds_EC.long(), prepend=torch.zeros_like(slots_EC[:, :1]), dim=1
    )
    units_EC = (tokens_E.unsqueeze(1) * shares_EC) >> (16 - UNIT_BITS)
    held_EC = slots_EC >= 0
    rank_EC = slots_EC.clamp(min=0) // ranks.slots
    load_R = (tokens_E.sum() * pours.ground_R.long()) >> (16 - UNIT_BITS)
    load_R.index_add_(0, rank_EC[held_EC], units_EC[held_EC])
    row_X = poured_X.clamp(min=0)
    tokens_X = torch.where(poured_X >= 0, tokens_E[row_X], 0)
    units_XC, rank_XC = units_EC[row_X], rank_EC[row_X]
    for _ in range(MOST_SWEEPS):
        before_XC = units_XC
        for colour in range(int(pours.colour_X.max()) + 1):
            wets_XC = held_EC[row_X] & ((pours.colour_X == colour) & (tokens_X > 0)).unsqueeze(1)
            floors_XC = load_R[rank_XC] - units_XC
            level_X1 = _levels(floors_XC, wets_XC, tokens_X << UNIT_BITS)
            poured_XC = torch.where(wets_XC, (level_X1 - floors_XC).clamp(min=0), units_XC)
            load_R.index_add_(0, rank_XC.flatten(), (poured_XC - units_XC).flatten())
            units_XC = poured_XC
        if (units_XC - before_XC).abs().max() < 1 << UNIT_BITS:
            break
    rounding_X = ((poured_X * HASH_STEP + offset + ranks.source * HASH_STEP) & 0xFFFF) >> (
        16 - UNIT_BITS
    )
    bounds_XC = (units_XC.cumsum(1) + rounding_X.unsqueeze(1)) >> UNIT_BITS
    last_XC = (
        torch.arange(held_EC.shape[1], device=slots_EC.device) >= held_EC[row_X].sum(1, True) - 1
    )
    return torch.where(last_XC, tokens_X.unsqueeze(1), bounds_XC.minimum(tokens_X.unsqueeze(1)))


def _levels(floors_XC: torch.Tensor, held_XC: torch.Tensor, volume_X: torch.Tensor) -> torch.Tensor:
    """int64 [X, 1]: over wet floors the level is (volume + their sum) / their number, rounded down. All
    are wet at first; leaving out those above the level lowers it further.
    """
    level_X1 = torch.full_like(volume_X, 1 << 30).unsqueeze(1)
    for _ in range(floors_XC.shape[1]):
        wet_XC = held_XC & (floors_XC < level_X1)
        total_X = volume_X + torch.where(wet_XC, floors_XC, 0).sum(1)
        lowered_X1 = (total_X // wet_XC.sum(1).clamp(min=1)).unsqueeze(1)
        level_X1 = level_X1.minimum(lowered_X1)
    return level_X1


def _positions(ids: torch.Tensor) -> torch.Tensor:
    """int64: of each id, how many equal ones come before it."""
    order = torch.argsort(ids, stable=True)
    by_id = ids[order]
    places = torch.arange(len(ids), device=ids.device)
    first = torch.searchsorted(by_id, by_id)
    positions = torch.empty_like(places)
    positions[order] = places - first
    return positions


COUNTED_POINTERS = ("topk_ids_ptr", "phase_ptr", "counts_ptr", "tokens_ptr")
COUNTED_SIZES = ("num_pairs", "num_phases", "num_experts", "top_k")
POURED_POINTERS = (
    "topk_ids_ptr",
    "tokens_ptr",
    "scratch_ptr",
    "replica_slots_ptr",
    "thresholds_ptr",
    "poured_ptr",
    "colour_ptr",
    "row_ptr",
    "ground_ptr",
    "offset_ptr",
    "slots_ptr",
)
POURED_SIZES = (
    "num_pairs",
    "num_experts",
    "top_k",
    "num_replicas",
    "first_step",
    "num_rows",
    "num_ranks",
    "slots_per_rank",
    "source",
    "num_blocks",
)


@jit(do_not_specialize=COUNTED_SIZES, do_not_specialize_on_alignment=COUNTED_POINTERS)
def _count_blocks(
    topk_ids_ptr,
    phase_ptr,
    counts_ptr,
    tokens_ptr,
    num_pairs,
    num_phases,
    num_experts,
    top_k,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    PHASE_BINS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Add a block's pairs to the counts, and store how many each expert has: tokens[block, expert].

    PHASE_BINS, EXPERTS: powers of two, at least 3 E and E.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(topk_ids_ptr + pair, mask=pair < num_pairs, other=-1)
    known = (given >= 0) & (given < num_experts)
    expert = tl.where(known, given, 0).to(tl.int32)
    token = pair // top_k
    phase = tl.load(phase_ptr + token, mask=known & (token < num_phases), other=IGNORED)
    counted = tl.histogram(phase.to(tl.int32) * num_experts + expert, PHASE_BINS, mask=known)
    bins = tl.arange(0, PHASE_BINS)
    tl.atomic_add(
        counts_ptr + bins, counted.to(tl.int64), mask=(bins < 3 * num_experts) & (counted > 0)
    )
    experts = tl.arange(0, EXPERTS)
    tl.store(
        tokens_ptr + tl.program_id(0) * num_experts + experts,
        tl.histogram(expert, EXPERTS, mask=known),
        mask=experts < num_experts,
    )


@jit
def _pour(
    tokens_ptr,
    load_ptr,
    bounds_ptr,
    replica_slots_ptr,
    thresholds_ptr,
    poured_ptr,
    colour_ptr,
    offset,
    num_rows,
    num_replicas,
    slots_per_rank,
    source,
    HASH_STEP: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    MOST_SWEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """Fill bounds[X, C], as `bounds_torch`. `load_ptr`: of each rank, in units."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, REPLICAS)
    expert = tl.load(poured_ptr + row, mask=row < num_rows, other=-1)
    colour = tl.load(colour_ptr + row, mask=row < num_rows, other=-1)
    tokens = tl.load(tokens_ptr + expert, mask=expert >= 0, other=0)
    place = expert[:, None] * num_replicas + column[None, :]
    inside = (expert[:, None] >= 0) & (column[None, :] < num_replicas)
    slot = tl.load(replica_slots_ptr + place, mask=inside, other=-1)
    held = slot >= 0
    rank = tl.where(held, slot, 0) // slots_per_rank
    upper = tl.load(thresholds_ptr + place, mask=held, other=0)
    lower = tl.load(thresholds_ptr + place - 1, mask=held & (column[None, :] > 0), other=0)
    units = ((tokens[:, None].to(tl.int64) * (upper - lower)) >> (16 - UNIT_BITS)).to(tl.int32)
    colours = tl.max(colour) + 1
    sweep = 0
    shifted = tl.max(tokens) << UNIT_BITS
    while (sweep < MOST_SWEEPS) & (shifted >= 1 << UNIT_BITS):
        before = units
        for each in range(colours):
            own = held & ((colour == each) & (tokens > 0))[:, None]
            floor = tl.load(load_ptr + rank, mask=own, other=0) - units
            # Where rows are fewer than warps, several hold the same ones: all read before one adds.
            tl.debug_barrier()
            level = tl.full([ROWS], 1 << 30, tl.int32)
            for _level in tl.static_range(REPLICAS):
                wet = own & (floor < level[:, None])
                total = (tokens << UNIT_BITS) + tl.sum(tl.where(wet, floor, 0), 1)
                level = tl.minimum(level, total // tl.maximum(tl.sum(wet.to(tl.int32), 1), 1))
            poured = tl.where(own, tl.maximum(level[:, None] - floor, 0), units)
            tl.atomic_add(load_ptr + rank, poured - units, mask=own, sem="relaxed")
            units = poured
            tl.debug_barrier()
        shifted = tl.max(tl.abs(units - before))
        sweep += 1
    rounding = (((expert + source) * HASH_STEP + offset) & 0xFFFF) >> (16 - UNIT_BITS)
    bounds = (tl.cumsum(units, 1) + rounding[:, None]) >> UNIT_BITS
    last = column[None, :] >= (tl.sum(held.to(tl.int32), 1) - 1)[:, None]
    bounds = tl.where(last, tokens[:, None], tl.minimum(bounds, tokens[:, None]))
    tl.store(
        bounds_ptr + row[:, None] * REPLICAS + column[None, :],
        bounds,
        mask=(row < num_rows)[:, None],
    )


@jit(do_not_specialize=POURED_SIZES, do_not_specialize_on_alignment=POURED_POINTERS)
def _pour_and_assign(
    topk_ids_ptr,
    tokens_ptr,
    scratch_ptr,
    replica_slots_ptr,
    thresholds_ptr,
    poured_ptr,
    colour_ptr,
    row_ptr,
    ground_ptr,
    offset_ptr,
    slots_ptr,
    num_pairs,
    num_experts,
    top_k,
    num_replicas,
    first_step,
    num_rows,
    num_ranks,
    slots_per_rank,
    source,
    num_blocks,
    HASH_STEP: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    MOST_SWEEPS: tl.constexpr,
    RANKS_PER_PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """Each program pours for itself, since it would wait for another one longer, and then assigns its block.

    scratch_ptr: of each program EXPERTS + EXPERTS + RANKS + ROWS * REPLICAS int32.
    """
    block = tl.program_id(0)
    offset = tl.load(offset_ptr).to(tl.int32)
    total_ptr = scratch_ptr + block * (2 * EXPERTS + RANKS + ROWS * REPLICAS)
    before_ptr = total_ptr + EXPERTS
    load_ptr = before_ptr + EXPERTS
    bounds_ptr = load_ptr + RANKS

    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for other in range(num_blocks):
        tokens = tl.load(tokens_ptr + other * num_experts + expert, mask=is_expert, other=0)
        total += tokens
        before += tl.where(other < block, tokens, 0)
    tl.store(total_ptr + expert, total)
    tl.store(before_ptr + expert, before)
    ranks = tl.arange(0, RANKS)
    ground = tl.load(ground_ptr + ranks, mask=ranks < num_ranks, other=0)
    height = (tl.sum(total).to(tl.int64) * ground) >> (16 - UNIT_BITS)
    tl.store(load_ptr + ranks, height.to(tl.int32))
    tl.debug_barrier()

    lower = tl.zeros([EXPERTS], tl.int32)
    for replica in range(num_replicas):
        place = expert * num_replicas + replica
        slot = tl.load(replica_slots_ptr + place, mask=is_expert, other=-1)
        held = slot >= 0
        upper = tl.load(thresholds_ptr + place, mask=held, other=0)
        units = (total.to(tl.int64) * (upper - lower)) >> (16 - UNIT_BITS)
        tl.atomic_add(
            load_ptr + slot // slots_per_rank, units.to(tl.int32), mask=held, sem="relaxed"
        )
        lower = upper
    tl.debug_barrier()

    _pour(
        total_ptr,
        load_ptr,
        bounds_ptr,
        replica_slots_ptr,
        thresholds_ptr,
        poured_ptr,
        colour_ptr,
        offset,
        num_rows,
        num_replicas,
        slots_per_rank,
        source,
        HASH_STEP,
        UNIT_BITS,
        MOST_SWEEPS,
        ROWS,
        REPLICAS,
    )
    tl.debug_barrier()

    index = tl.arange(0, BLOCK)
    pair = block * BLOCK + index
    given = tl.load(topk_ids_ptr + pair, mask=pair < num_pairs, other=-1)
    known = (given >= 0) & (given < num_experts)
    own = tl.where(known, given, 0).to(tl.int32)
    row = tl.load(row_ptr + own, mask=known, other=-1)
    row = tl.where(tl.sum(total) * RANKS_PER_PAIR >= num_ranks, row, -1)
    poured = row >= 0
    # position = equal ids in blocks before, and before it in its own
    position = tl.load(before_ptr + own, mask=poured, other=0)
    for start in range(0, BLOCK, COMPARED):
        earlier = start + tl.arange(0, COMPARED)
        pairs = block * BLOCK + earlier
        ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
        equal = (given[:, None] == ids[None, :]) & (earlier[None, :] < index[:, None])
        position += tl.sum(equal.to(tl.int32), 1)
    choice = tl.zeros([BLOCK], tl.int32)
    for replica in range(REPLICAS):
        bound = tl.load(bounds_ptr + row * REPLICAS + replica, mask=poured, other=0)
        choice += (bound <= position).to(tl.int32)
    # Others by the thresholds, as in route_and_count.
    token_hash = (pair // top_k * HASH_STEP + offset) & 0xFFFF
    by_quota = tl.zeros([BLOCK], tl.int32)
    step = first_step
    while step > 0:
        probe = by_quota + step
        place = own * num_replicas + probe - 1
        threshold = tl.load(
            thresholds_ptr + place, mask=known & (probe < num_replicas), other=65536
        )
        by_quota = tl.where(token_hash >= threshold, probe, by_quota)
        step = step // 2
    choice = tl.where(poured, tl.minimum(choice, num_replicas - 1), by_quota)
    slot = tl.load(replica_slots_ptr + own * num_replicas + choice, mask=known, other=-1)
    tl.store(slots_ptr + pair, tl.where(given < 0, given, slot), mask=pair < num_pairs)


def bins(num_experts: int, num_ranks: int, num_rows: int, num_replicas: int) -> dict[str, int]:
    """Sizes of tiles: powers of two."""
    return {
        "EXPERTS": triton.next_power_of_2(num_experts),
        "RANKS": triton.next_power_of_2(num_ranks),
        "ROWS": triton.next_power_of_2(num_rows),
        "REPLICAS": triton.next_power_of_2(min(num_replicas, MOST_REPLICAS)),
    }


def _launch(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    tables: LayerTables,
    pours: PourTables,
    offset: torch.Tensor,
    ranks: Ranks,
    slots_TK: torch.Tensor,
) -> None:
    num_pairs, top_k = topk_ids_TK.numel(), topk_ids_TK.shape[1]
    if not num_pairs:
        return
    num_experts, num_replicas = tables.replica_slots_EC.shape
    num_rows, num_blocks = len(pours.poured_X), triton.cdiv(num_pairs, BLOCK)
    sizes = bins(num_experts, ranks.total, num_rows, num_replicas)
    room = 2 * sizes["EXPERTS"] + sizes["RANKS"] + sizes["ROWS"] * sizes["REPLICAS"]
    memory = {"dtype": torch.int32, "device": topk_ids_TK.device}
    tokens_BE = torch.empty(num_blocks, num_experts, **memory)
    _count_blocks[(num_blocks,)](
        topk_ids_TK,
        phase_T,
        tables.counts_AE,
        tokens_BE,
        num_pairs,
        phase_T.shape[0],
        num_experts,
        top_k,
        IGNORED=IGNORED,
        BLOCK=BLOCK,
        PHASE_BINS=triton.next_power_of_2(3 * num_experts),
        EXPERTS=sizes["EXPERTS"],
    )
    _pour_and_assign[(num_blocks,)](
        topk_ids_TK,
        tokens_BE,
        torch.empty(num_blocks, room, **memory),
        tables.replica_slots_EC,
        tables.thresholds_EC,
        pours.poured_X,
        pours.colour_X,
        pours.row_E,
        pours.ground_R,
        offset,
        slots_TK,
        num_pairs,
        num_experts,
        top_k,
        num_replicas,
        1 << (num_replicas - 1).bit_length() >> 1,
        num_rows,
        ranks.total,
        ranks.slots,
        ranks.source,
        num_blocks,
        HASH_STEP=HASH_STEP,
        UNIT_BITS=UNIT_BITS,
        MOST_SWEEPS=MOST_SWEEPS,
        RANKS_PER_PAIR=RANKS_PER_PAIR,
        **POUR_OPTIONS,
        **sizes,
    )
