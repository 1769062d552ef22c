"""Count a step's tokens per logical expert and send each to a slot, in one pass over the top-k ids.

vLLM's `eplb_map_to_physical_and_record` counts per slot, and picks a replica by a blind hash from a
table 1024 wide. This kernel counts per logical expert and phase, and picks by quota from the replicas
that exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_rebalance.kernels.language import jit, runs_triton, tl, triton
from ep_rebalance.kernels.shared_arithmetic import HASH_STEP, IGNORED

HISTOGRAM_TOKENS = 128
"""With so many (token, expert) pairs per expert or more, a block counts in shared memory first.

On an H200 that took 9 us for 128 experts and 17 us for 256, however many pairs there were. vLLM's kernel, in
which each pair adds to the counts by itself, took 6 us with 4 pairs per expert, 8 with 32 to 64 and 20 with
256 to 512 (benchmarks/kernels.py).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTables:
    """One layer's counters and dispatch tables.

    They are only ever written in place, because CUDA graphs hold their addresses.

    counts_AE: int64 [3, E], tokens. Per logical expert since the last snapshot; the rows are PREFILL,
        DECODE and IGNORED.
    replica_slots_EC: int32 [E, C]. The slots of each expert, filled up with -1.
    thresholds_EC: int32 [E, C], 1/65536. Cumulative quotas, ascending; 65536 from the last replica on.
    """

    counts_AE: torch.Tensor
    replica_slots_EC: torch.Tensor
    thresholds_EC: torch.Tensor


def route_and_count(
    topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, tables: LayerTables, offset: torch.Tensor
) -> torch.Tensor:
    """[T, K], of the dtype of `topk_ids_TK`: the slot for each expert of each token, which is counted.

    topk_ids_TK: integer [T, K]. Logical ids. Those below 0 are padding, which is passed on as it is and
        not counted. Those of E or more, which no router gives, become -1 and are not counted either.
    phase_T: int8 [T] or shorter. PREFILL, DECODE or IGNORED; tokens beyond its end are IGNORED.
    tables: contiguous. Their counts are added to.
    offset: int64 [1]. It differs from step to step, so that short batches do not favour one replica.

    With hash = (t * HASH_STEP + offset) mod 65536, token `t` goes to replica `j` of its expert, where `j`
    is the number of the expert's thresholds that are at most hash. Kernel and reference give the same
    bits.
    """
    if torch.compiler.is_compiling():
        slots_TK: torch.Tensor = _operation(
            topk_ids_TK,
            phase_T,
            tables.counts_AE,
            tables.replica_slots_EC,
            tables.thresholds_EC,
            offset,
        )
        return slots_TK
    if runs_triton(topk_ids_TK):
        slots_TK = torch.empty_like(topk_ids_TK, memory_format=torch.contiguous_format)
        _launch(topk_ids_TK, phase_T, tables.counts_AE, tables, offset, slots_TK)
        return slots_TK
    return route_and_count_torch(topk_ids_TK, phase_T, tables, offset)


def count_experts(
    topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, counts_AE: torch.Tensor
) -> None:
    """Add to the counts without routing; arguments as in `route_and_count`."""
    if runs_triton(topk_ids_TK) and not torch.compiler.is_compiling():
        _launch(topk_ids_TK, phase_T, counts_AE)
    else:
        count_torch(topk_ids_TK, phase_T, counts_AE)


def route_and_count_torch(
    topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, tables: LayerTables, offset: torch.Tensor
) -> torch.Tensor:
    """The reference for `route_and_count`."""
    count_torch(topk_ids_TK, phase_T, tables.counts_AE)
    return route_torch(topk_ids_TK, tables, offset)


def count_torch(topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, counts_AE: torch.Tensor) -> None:
    """The reference for `count_experts`."""
    num_tokens, num_experts = topk_ids_TK.shape[0], counts_AE.shape[1]
    if phase_T.shape[0] != num_tokens:
        without = num_tokens - phase_T.shape[0]
        phase_T = torch.nn.functional.pad(phase_T, (0, without), value=IGNORED)
    known_TK = topk_ids_TK.clamp(0, num_experts - 1)
    index_TK = known_TK + phase_T.long().unsqueeze(1) * num_experts
    counted_TK = (known_TK == topk_ids_TK).long()
    counts_AE.view(-1).scatter_add_(0, index_TK.reshape(-1), counted_TK.reshape(-1))


def route_torch(
    topk_ids_TK: torch.Tensor, tables: LayerTables, offset: torch.Tensor
) -> torch.Tensor:
    """The slots alone, without counting."""
    num_tokens, (num_experts, num_replicas) = topk_ids_TK.shape[0], tables.replica_slots_EC.shape
    known_TK = topk_ids_TK.long().clamp(0, num_experts - 1)
    if num_replicas == 1:
        slots_TK = tables.replica_slots_EC[:, 0][known_TK]
    else:
        tokens_T = torch.arange(num_tokens, device=topk_ids_TK.device)
        hash_T = (tokens_T * HASH_STEP + offset) & 0xFFFF
        passed_TKC = hash_T.view(-1, 1, 1) >= tables.thresholds_EC[known_TK]
        choice_TK1 = passed_TKC.sum(-1, keepdim=True)
        slots_TK = tables.replica_slots_EC[known_TK].gather(-1, choice_TK1).squeeze(-1)
    strays_TK = topk_ids_TK.clamp(max=-1)
    return torch.where(known_TK == topk_ids_TK, slots_TK.to(topk_ids_TK.dtype), strays_TK)


@torch.library.custom_op("ep_rebalance::route_and_count", mutates_args=("counts_AE",))
def _operation(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    counts_AE: torch.Tensor,
    replica_slots_EC: torch.Tensor,
    thresholds_EC: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """`route_and_count` for torch.compile, with the tables one by one."""
    tables = LayerTables(
        counts_AE=counts_AE, replica_slots_EC=replica_slots_EC, thresholds_EC=thresholds_EC
    )
    return route_and_count(topk_ids_TK, phase_T, tables, offset)


@_operation.register_fake
def _(topk_ids_TK: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(topk_ids_TK, memory_format=torch.contiguous_format)


POINTERS = (
    "topk_ids_ptr",
    "phase_ptr",
    "counts_ptr",
    "replica_slots_ptr",
    "thresholds_ptr",
    "offset_ptr",
    "slots_ptr",
)
SIZES = ("num_pairs", "num_phases", "num_experts", "top_k", "num_replicas", "first_step")


def _launch_metadata(grid, kernel, args):
    """The bytes that one launch moves, for Proton: ids in, slots out, phases, and all tables once."""
    routes = args["slots_ptr"] is not None
    pairs = args["num_pairs"] * args["topk_ids_ptr"].itemsize * (1 + routes)
    phases = args["num_pairs"] // args["top_k"] * args["phase_ptr"].itemsize
    tables = args["num_experts"] * (routes * 2 * args["num_replicas"] * 4 + 3 * 8)
    return {"name": f"route_and_count {args['num_pairs']} pairs", "bytes": pairs + phases + tables}


@jit(
    launch_metadata=_launch_metadata,
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=POINTERS,
)
def _kernel(
    topk_ids_ptr,
    phase_ptr,
    counts_ptr,
    replica_slots_ptr,
    thresholds_ptr,
    offset_ptr,
    slots_ptr,
    num_pairs,
    num_phases,
    num_experts,
    top_k,
    num_replicas,
    first_step,
    HASH_STEP: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program takes BLOCK (token, expert) pairs.

    slots_ptr: None to count only.
    first_step: the largest power of two below `num_replicas`, or 0.
    BINS: 0 to add every pair to the counts by itself. Otherwise a power of two, at least 3 E, and the
        block adds each bin once.

    Sizes and alignments are not specialised on: a new variant would be compiled while a step waits.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < num_pairs
    given = tl.load(topk_ids_ptr + pair, mask=valid, other=-1)
    known = (given >= 0) & (given < num_experts)
    expert = tl.where(known, given, 0).to(tl.int32)
    token = pair // top_k
    marked = known & (token < num_phases)
    phase = tl.load(phase_ptr + token, mask=marked, other=IGNORED).to(tl.int32)
    # counts[phase, expert] += 1
    place = phase * num_experts + expert
    if BINS:
        counted = tl.histogram(place, BINS, mask=known)
        bins = tl.arange(0, BINS)
        tl.atomic_add(
            counts_ptr + bins, counted.to(tl.int64), mask=(bins < 3 * num_experts) & (counted > 0)
        )
    else:
        tl.atomic_add(counts_ptr + place, tl.full([BLOCK], 1, tl.int64), mask=known)

    if slots_ptr is not None:
        token_hash = (token * HASH_STEP + tl.load(offset_ptr).to(tl.int32)) & 0xFFFF
        row = expert * num_replicas
        # choice = number of thresholds <= hash, found by binary search from the highest bit down: a
        # probe is taken if the probe-th threshold is still at most the hash.
        choice = tl.zeros([BLOCK], tl.int32)
        step = first_step
        while step > 0:
            probe = choice + step
            inside = known & (probe < num_replicas)
            threshold = tl.load(thresholds_ptr + row + probe - 1, mask=inside, other=65536)
            choice = tl.where(token_hash >= threshold, probe, choice)
            step = step // 2
        slot = tl.load(replica_slots_ptr + row + choice, mask=known, other=-1)
        tl.store(slots_ptr + pair, tl.where(given < 0, given, slot), mask=valid)


def histogram_pairs(num_experts: int) -> int:
    """The fewest (token, expert) pairs that are counted in shared memory first."""
    return HISTOGRAM_TOKENS * num_experts


def options(num_pairs: int, num_experts: int) -> dict[str, int]:
    """BLOCK, BINS and warps of a launch."""
    if num_pairs < histogram_pairs(num_experts):
        return {"BLOCK": 256, "BINS": 0, "num_warps": 4}
    return {"BLOCK": 2048, "BINS": triton.next_power_of_2(3 * num_experts), "num_warps": 16}


def _launch(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    counts_AE: torch.Tensor,
    tables: LayerTables | None = None,
    offset: torch.Tensor | None = None,
    slots_TK: torch.Tensor | None = None,
) -> None:
    """Count, and fill `slots_TK`; without the last three arguments, count only."""
    num_pairs, num_experts = topk_ids_TK.numel(), counts_AE.shape[1]
    num_replicas = 1 if tables is None else tables.replica_slots_EC.shape[1]
    if num_pairs:
        chosen = options(num_pairs, num_experts)
        _kernel[(triton.cdiv(num_pairs, chosen["BLOCK"]),)](
            topk_ids_TK.contiguous(),
            phase_T,
            counts_AE,
            None if tables is None else tables.replica_slots_EC,
            None if tables is None else tables.thresholds_EC,
            offset,
            slots_TK,
            num_pairs,
            phase_T.shape[0],
            num_experts,
            topk_ids_TK.shape[1],
            num_replicas,
            1 << (num_replicas - 1).bit_length() >> 1,
            HASH_STEP=HASH_STEP,
            IGNORED=IGNORED,
            **chosen,
        )
