"""Triton where it is installed: the kernels' modules also hold their torch references, which run without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "INTERPRETED",
    "as_float8",
    "as_stored",
    "jit",
    "multiply",
    "processors",
    "runs_triton",
    "tl",
    "triton",
]

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU engine needs none
    triton = tl = None

INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run on CPU tensors, one program after the other."""


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody calls."""
    if triton is None:
        return function if function is not None else lambda undecorated: undecorated
    return triton.jit(function, **options)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on this tensor launches its kernel and not its torch reference."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, the programs of a persistent grid; a few in the interpreter."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 3


# Triton 3.9's interpreter multiplies bfloat16 as if it were integers, and its casts to bfloat16 and to
# 8-bit floats lose the carry. With INTERPRETED the next functions come to the right values without it.


@jit
def multiply(x, weight, total, INTERPRETED: tl.constexpr):
    """`total` plus the matrix product, in float32."""
    if INTERPRETED:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee")


@jit
def as_stored(value, pointer, INTERPRETED: tl.constexpr):
    """A float32 tile in the type that `pointer` points to."""
    if INTERPRETED:
        if pointer.dtype.element_ty == tl.bfloat16:
            value = _rounded(value, 16)
    return value.to(pointer.dtype.element_ty)


@jit
def as_float8(value, INTERPRETED: tl.constexpr):
    """A float32 tile of at most 448 as float8e4nv."""
    if INTERPRETED:
        # Below 2**-6 there are steps of 2**-9, to which adding a number with such steps rounds.
        denormal = (value + 24576.0) - 24576.0
        value = tl.where(tl.abs(value) < 0.015625, denormal, _rounded(value, 20))
    return value.to(tl.float8e4nv)


@jit
def _rounded(value, BITS: tl.constexpr):
    """To nearest, ties to even, leaving out the last BITS bits of the mantissa."""
    bits = value.to(tl.int32, bitcast=True)
    half = ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)
    return ((bits + half) & -(1 << BITS)).to(tl.float32, bitcast=True)
