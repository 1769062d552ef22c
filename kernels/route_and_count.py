"""Count a step's tokens per logical expert and send each to a slot, in one pass over the top-k ids.

`route_and_count` picks the Triton kernel on GPU tensors and the torch reference elsewhere; both
give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HASH_STEP = 40503
"""Odd, near 2**16 times the golden ratio: consecutive tokens fall evenly over the 16-bit hash range
(Knuth).
"""

PREFILL, DECODE, IGNORED = 0, 1, 2
"""Rows of the count tensor. What a token is not to be counted for lands in IGNORED, without a
branch.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTables:
    """One layer's counters and dispatch tables. Written in place only: CUDA graphs hold the
    addresses.

    counts_AE: int64 [3, E], tokens per logical expert since the last snapshot; rows PREFILL,
    DECODE, IGNORED.
    replica_slots_EC: int32 [E, C], slots of each expert (C replicas at most), -1 where there are
    fewer.
    thresholds_EC: int32 [E, C], cumulative quota in 1/65536; the last used one is 65536.
    """

    counts_AE: torch.Tensor
    replica_slots_EC: torch.Tensor
    thresholds_EC: torch.Tensor


def count_experts(
    topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, counts_AE: torch.Tensor
) -> None:
    """Add each token's experts to its phase's row of `counts_AE`, in place.

    topk_ids_TK: integer [T, K], logical ids. phase_T: int64 [T], PREFILL, DECODE or IGNORED.
    """
    index_TK = topk_ids_TK + phase_T.unsqueeze(1) * counts_AE.shape[1]
    ones = counts_AE.new_ones(()).expand(index_TK.numel())
    counts_AE.view(-1).scatter_add_(0, index_TK.reshape(-1), ones)


def route_torch(
    topk_ids_TK: torch.Tensor, tables: LayerTables, offset: torch.Tensor
) -> torch.Tensor:
    """The slot of each of a token's experts; integer [T, K], dtype of `topk_ids_TK`.

    offset: int64 [1], differs from step to step, so that short batches do not favour one replica.
    """
    num_tokens, num_replicas = topk_ids_TK.shape[0], tables.replica_slots_EC.shape[1]
    ids_TK = topk_ids_TK.long()
    if num_replicas == 1:
        return tables.replica_slots_EC[:, 0][ids_TK].to(topk_ids_TK.dtype)
    tokens_T = torch.arange(num_tokens, device=topk_ids_TK.device)
    hash_T = (tokens_T * HASH_STEP + offset) & 0xFFFF
    passed_TKC = hash_T.view(-1, 1, 1) >= tables.thresholds_EC[ids_TK]
    choice_TK1 = passed_TKC.sum(-1, keepdim=True)
    return tables.replica_slots_EC[ids_TK].gather(-1, choice_TK1).squeeze(-1).to(topk_ids_TK.dtype)


def route_and_count(
    topk_ids_TK: torch.Tensor, phase_T: torch.Tensor, tables: LayerTables, offset: torch.Tensor
) -> torch.Tensor:
    """`count_experts`, then `route_torch`, in one kernel where the tensors are on a GPU.

    Raises ValueError if there is not one phase per token: the kernel would read past the phases.
    """
    if phase_T.shape[0] != topk_ids_TK.shape[0]:
        raise ValueError(f"{topk_ids_TK.shape[0]} tokens, but {phase_T.shape[0]} phases")
    if topk_ids_TK.is_cuda:
        from ep_rebalance.kernels.route_and_count_triton import route_and_count_triton

        return route_and_count_triton(topk_ids_TK, phase_T, tables, offset)
    count_experts(topk_ids_TK, phase_T, tables.counts_AE)
    return route_torch(topk_ids_TK, tables, offset)
