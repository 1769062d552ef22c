"""Rows as bytes: hidden state, slots and weights side by side, so that one collective carries them all."""

from __future__ import annotations

from typing import Literal

import torch

from ep_rebalance.all_to_all.dispatched import Rows
from ep_rebalance.kernels.quantize_rows import GROUP, dequantize_rows, quantize_rows

Payload = Literal["full", "fp8"]
"""Hidden states on the wire: as they are, or in 8-bit floats with a scale per 128 columns. The latter
rounds them, so results differ from those without expert parallelism.
"""


def pack_rows(rows: Rows, payload: Payload) -> torch.Tensor:
    """uint8 [M, bytes of a row], the rows as they are sent."""
    hidden = quantize_rows(rows.hidden_MH) if payload == "fp8" else (rows.hidden_MH,)
    parts = (*hidden, rows.slots_MK.to(torch.int32), rows.weights_MK.to(torch.float32))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_rows(wire: torch.Tensor, like: Rows, payload: Payload) -> Rows:
    """Inverse of `pack_rows`.

    wire: uint8 [M, bytes of a row].
    like: any rows of the same widths and dtype.
    """
    columns, top_k = like.hidden_MH.shape[1], like.slots_MK.shape[1]
    dtype = like.hidden_MH.dtype
    if payload == "fp8":
        quantized, scales, slots, weights = _split(
            wire,
            (columns, torch.float8_e4m3fn),
            (columns // GROUP, torch.float32),
            (top_k, torch.int32),
            (top_k, torch.float32),
        )
        hidden = dequantize_rows(quantized, scales, dtype)
    else:
        hidden, slots, weights = _split(
            wire, (columns, dtype), (top_k, torch.int32), (top_k, torch.float32)
        )
    return Rows(hidden_MH=hidden, slots_MK=slots, weights_MK=weights)


def _split(wire: torch.Tensor, *parts: tuple[int, torch.dtype]) -> list[torch.Tensor]:
    """The columns of `wire` as tensors.

    parts: number of columns and dtype of each, from left to right.
    """
    widths = [columns * dtype.itemsize for columns, dtype in parts]
    return [
        part.contiguous().view(dtype)
        for part, (_, dtype) in zip(wire.split(widths, dim=1), parts, strict=True)
    ]
