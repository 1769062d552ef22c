"""Rows in 8-bit floating point with one scale per group of 128 columns, and back.

This is the format of DeepSeek-V3's activations (arXiv 2412.19437, section 3.3): `float8_e4m3fn`, with

    scale = max |x| / 448 over the group          quantized = x / scale
"""

from __future__ import annotations

import torch

from ep_rebalance.kernels.language import INTERPRETED, as_float8, jit, runs_triton, tl

GROUP = 128
"""How many columns share a scale."""

LARGEST = 448.0
"""The largest finite `float8_e4m3fn`."""

BLOCK = 16
"""How many groups a program quantises."""

SMALLEST_SCALE = 1e-10
"""Keeps a group of zeros from dividing by zero."""


def quantize_rows(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(quantized_MH, scales): float8_e4m3fn [M, H] and float32 [M, H / 128].

    Raises ValueError if H is not a multiple of 128.
    """
    if rows_MH.shape[1] % GROUP:
        raise ValueError(f"{rows_MH.shape[1]} columns do not divide into groups of {GROUP}")
    if torch.compiler.is_compiling():
        quantized, scales = _operation(rows_MH)
        return quantized, scales
    return (_launch if runs_triton(rows_MH) else quantize_rows_torch)(rows_MH)


def quantize_rows_torch(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference for `quantize_rows`."""
    groups = rows_MH.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / LARGEST).clamp(min=SMALLEST_SCALE)
    scaled = (groups / scales.unsqueeze(2)).clamp(-LARGEST, LARGEST)
    return scaled.flatten(1).to(torch.float8_e4m3fn), scales


def dequantize_rows(
    quantized_MH: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[M, H], the rows that were quantised, as precise as 8 bits are.

    quantized_MH, scales: as returned by `quantize_rows`.
    """
    groups = quantized_MH.float().unflatten(1, (-1, GROUP))
    return (groups * scales.unsqueeze(2)).flatten(1).to(dtype)


@torch.library.custom_op("ep_rebalance::quantize_rows", mutates_args=())
def _operation(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` for torch.compile."""
    return quantize_rows(rows_MH)


@_operation.register_fake
def _(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = rows_MH.shape
    return (
        rows_MH.new_empty(rows_MH.shape, dtype=torch.float8_e4m3fn),
        rows_MH.new_empty(rows, columns // GROUP, dtype=torch.float32),
    )


@jit
def quantize_group(
    value, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """(quantised tile, scale of each row) of a float32 tile [rows, GROUP]."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=1) / LARGEST, SMALLEST_SCALE)
    scaled = value / scale[:, None]
    return as_float8(tl.clamp(scaled, -LARGEST, LARGEST), INTERPRETED), scale


@jit
def _kernel(
    rows_ptr,
    quantized_ptr,
    scales_ptr,
    num_groups,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = group < num_groups
    value = tl.load(rows_ptr + place, mask=valid[:, None], other=0.0).to(tl.float32)
    quantized, scale = quantize_group(value, LARGEST, SMALLEST_SCALE, INTERPRETED)
    tl.store(quantized_ptr + place, quantized, mask=valid[:, None])
    tl.store(scales_ptr + group, scale, mask=valid)


def _launch(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_groups = rows_MH.numel() // GROUP
    quantized = rows_MH.new_empty(rows_MH.shape, dtype=torch.float8_e4m3fn)
    scales = rows_MH.new_empty(rows_MH.shape[0], rows_MH.shape[1] // GROUP, dtype=torch.float32)
    if num_groups:
        _kernel[(-(-num_groups // BLOCK),)](
            rows_MH.contiguous(),
            quantized,
            scales,
            num_groups,
            LARGEST=LARGEST,
            SMALLEST_SCALE=SMALLEST_SCALE,
            GROUP=GROUP,
            BLOCK=BLOCK,
            INTERPRETED=INTERPRETED,
        )
    return quantized, scales
