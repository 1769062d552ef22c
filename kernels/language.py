"""Triton, if it is installed; kernel modules also hold torch references, which run without it."""

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
except ImportError:  # the CPU engine does not need it
    triton = tl = None

INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret
"""With TRITON_INTERPRET=1 kernels run on CPU tensors, one program after another."""


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`; without Triton, the undecorated function, which is then never called."""
    if triton is None:
        return function if function is not None else lambda undecorated: undecorated
    return triton.jit(function, **options)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on this tensor launches its kernel rather than its torch reference."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has, for the grid of a persistent kernel; a few in
    the interpreter.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 3


# Triton 3.9's interpreter multiplies bfloat16 as if it were integers, and its casts to bfloat16 and to
# 8-bit floats lose the carry. With INTERPRETED the next functions avoid both.


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
        # Below 2**-6 the values are multiples of 2**-9. At 1.5 * 2**14 so are those of float32, so
        # that the addition rounds to them.
        denormal = (value + 24576.0) - 24576.0
        value = tl.where(tl.abs(value) < 0.015625, denormal, _rounded(value, 20))
    return value.to(tl.float8e4nv)


@jit
def _rounded(value, BITS: tl.constexpr):
    """`value` without the last BITS bits of its mantissa, rounded to nearest, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    half = ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)
    return ((bits + half) & -(1 << BITS)).to(tl.float32, bitcast=True)
