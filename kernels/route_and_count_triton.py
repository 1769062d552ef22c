"""Triton form of `route_and_count`; also runs in Triton's interpreter on CPU (TRITON_INTERPRET=1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ep_rebalance.kernels.route_and_count import HASH_STEP, LayerTables


def _launch_metadata(grid, kernel, args):
    """Bytes that one launch moves, for Proton: ids in, slots out, phases, and all tables once."""
    pairs = args["num_pairs"] * (args["topk_ids_ptr"].itemsize + args["slots_ptr"].itemsize)
    phases = args["num_pairs"] // args["top_k"] * args["phase_ptr"].itemsize
    tables = args["num_experts"] * (2 * args["REPLICAS"] * 4 + 3 * 8)
    return {"name": f"route_and_count {args['num_pairs']} pairs", "bytes": pairs + phases + tables}


@triton.jit(launch_metadata=_launch_metadata)
def _route_and_count_kernel(
    topk_ids_ptr,
    phase_ptr,
    counts_ptr,
    replica_slots_ptr,
    thresholds_ptr,
    offset_ptr,
    slots_ptr,
    num_pairs,
    num_experts,
    top_k,
    HASH_STEP: tl.constexpr,
    REPLICAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < num_pairs
    expert = tl.load(topk_ids_ptr + pair, mask=valid, other=0).to(tl.int64)
    token = (pair // top_k).to(tl.int64)
    phase = tl.load(phase_ptr + token, mask=valid, other=0)
    tl.atomic_add(
        counts_ptr + phase * num_experts + expert, tl.full([BLOCK], 1, tl.int64), mask=valid
    )

    token_hash = (token * HASH_STEP + tl.load(offset_ptr)) & 0xFFFF
    choice = tl.zeros([BLOCK], tl.int64)
    for replica in tl.static_range(REPLICAS - 1):
        threshold = tl.load(thresholds_ptr + expert * REPLICAS + replica, mask=valid, other=0)
        choice += (token_hash >= threshold).to(tl.int64)
    slot = tl.load(replica_slots_ptr + expert * REPLICAS + choice, mask=valid, other=0)
    tl.store(slots_ptr + pair, slot, mask=valid)


def route_and_count_triton(
    topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, tables: LayerTables, offset: torch.Tensor
) -> torch.Tensor:
    """See `route_and_count`. The tables must be contiguous."""
    slots_TK = torch.empty_like(topk_ids_TK, memory_format=torch.contiguous_format)
    num_pairs = topk_ids_TK.numel()
    if num_pairs:
        block = 256
        _route_and_count_kernel[(triton.cdiv(num_pairs, block),)](
            topk_ids_TK.contiguous(),
            phase_T,
            tables.counts_AE,
            tables.replica_slots_EC,
            tables.thresholds_EC,
            offset,
            slots_TK,
            num_pairs,
            tables.counts_AE.shape[1],
            topk_ids_TK.shape[1],
            HASH_STEP=HASH_STEP,
            REPLICAS=tables.replica_slots_EC.shape[1],
            BLOCK=block,
        )
    return slots_TK
