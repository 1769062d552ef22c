"""A token's result: the weighted outputs of its experts, summed in top-k order in float32.

Each addition is one fused multiply-add, as in vLLM's CPU kernel (csrc/cpu/cpu_fused_moe.cpp), so that
the sum has the same bits wherever the outputs were computed.
"""

from __future__ import annotations

import torch

from ep_rebalance.kernels.language import jit, runs_triton, tl, triton


def weighted_sum(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """float32 [T, H], the sum over k of `weights[t, k] * outputs[position[t, k]]`.

    outputs_NH: [N, H]. One unweighted output for each pair.
    position_TK: int64 [T, K]. Rows of `outputs_NH`; -1 adds nothing, whatever its weight.
    weights_TK: float32 [T, K].

    Kernel and reference give the same bits.
    """
    if torch.compiler.is_compiling():
        total: torch.Tensor = _operation(outputs_NH, position_TK, weights_TK)
        return total
    return (_launch if runs_triton(outputs_NH) else weighted_sum_torch)(
        outputs_NH, position_TK, weights_TK
    )


def weighted_sum_torch(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The reference for `weighted_sum`."""
    if not len(outputs_NH):
        return outputs_NH.new_zeros(len(position_TK), outputs_NH.shape[1], dtype=torch.float32)
    nothing_TK = position_TK < 0
    outputs_TKH = outputs_NH[position_TK].masked_fill_(nothing_TK.unsqueeze(2), 0.0).float()
    weights = weights_TK.float().masked_fill(nothing_TK, 0.0)
    total = outputs_TKH[:, 0] * weights[:, :1]
    for k in range(1, position_TK.shape[1]):
        total = torch.addcmul(total, outputs_TKH[:, k], weights[:, k : k + 1])
    return total


@torch.library.custom_op("ep_rebalance::weighted_sum", mutates_args=())
def _operation(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`weighted_sum` for torch.compile."""
    return weighted_sum(outputs_NH, position_TK, weights_TK)


@_operation.register_fake
def _(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    return outputs_NH.new_empty(len(position_TK), outputs_NH.shape[1], dtype=torch.float32)


@jit
def _kernel(
    outputs_ptr,
    position_ptr,
    weights_ptr,
    total_ptr,
    hidden,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < hidden
    # total[h] = fma(outputs[row_k, h], weight_k, total[h]) for k = 0, 1, ...; where row_k is -1 nothing
    # is read, since `columns` is 0, and zeros are added.
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + k)
        weight = tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        weight = tl.where(row < 0, 0.0, weight)
        columns = tl.where(row < 0, 0, hidden)
        place = outputs_ptr + row * hidden + column
        value = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
        if k == 0:
            total = value * weight
        else:
            total = tl.fma(value, tl.zeros([BLOCK], tl.float32) + weight, total)
    tl.store(total_ptr + token * hidden + column, total, mask=valid)


def block(hidden: int) -> int:
    """How many columns a program sums."""
    return min(1024, 1 << (hidden - 1).bit_length())


def _launch(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    (tokens, top_k), hidden = position_TK.shape, outputs_NH.shape[1]
    total = outputs_NH.new_empty(tokens, hidden, dtype=torch.float32)
    if total.numel():
        columns = block(hidden)
        _kernel[(tokens, triton.cdiv(hidden, columns))](
            outputs_NH.contiguous(),
            position_TK.contiguous(),
            weights_TK.contiguous(),
            total,
            hidden,
            TOP_K=top_k,
            BLOCK=columns,
        )
    return total
