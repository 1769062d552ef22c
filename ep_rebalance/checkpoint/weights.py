"""Weights: how many bytes a parameter of an expert takes in the precision of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ep_rebalance.checkpoint.files import Checkpoint, Settings

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_DEFAULT = 2.0
_LARGEST_GROUP = 1 << 24
"""Longer than any row."""
_MXFP4 = 17 / 32
"""32 numbers of 4 bits have a scale of 8 bits."""
_NVFP4 = 9 / 16
"""16 numbers of 4 bits have a scale of 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSize:
    """The size of a parameter of an expert.

    source: by which setting it is known, in words.
    """

    bytes_per_parameter: float
    source: str


def weight_size(checkpoint: Checkpoint) -> WeightSize:
    """The size of a parameter, scales included where each has few parameters.

    A quantisation that this does not know is taken for one of 8 bits, and `source` says so.
    """
    quantisation = checkpoint.quantisation
    if not quantisation:
        name = str(_first(checkpoint, "dtype") or _first(checkpoint, "torch_dtype") or "")
        known = _BYTES.get(name.removeprefix("torch."))
        source = f"dtype {name}" if known else "no dtype is given: 16 bits assumed"
        return WeightSize(bytes_per_parameter=known or _DEFAULT, source=source)
    method = str(quantisation.get("quant_method") or "").lower().replace("_", "-")
    algorithm = _algorithm(quantisation)
    for words, size in (("NVFP4", _NVFP4), ("MXFP4", _MXFP4), ("FP8", 1.0)):
        if words in algorithm or words.lower() in method:
            return WeightSize(bytes_per_parameter=size, source=f"quantisation {words}")
    bits, group = _bits(quantisation)
    if bits:
        # A scale of 16 bits for each group; one for a whole row does not count.
        size = bits / 8.0 + (2.0 / group if group > 0 else 0.0)
        scales = f", a scale for {group}" if group > 0 else ""
        return WeightSize(
            bytes_per_parameter=size, source=f"quantisation {method}, {bits} bits{scales}"
        )
    return WeightSize(
        bytes_per_parameter=1.0,
        source=f"quantisation {method or algorithm or 'without a name'} is not known: 8 bits assumed",
    )


def _first(checkpoint: Checkpoint, name: str) -> Any:
    return checkpoint.text.get(name) or checkpoint.config.get(name)


def _algorithm(quantisation: Settings) -> str:
    """ModelOpt's name for it."""
    held = quantisation.get("quantization")
    held = held if isinstance(held, Mapping) else quantisation
    return str(held.get("quant_algo") or "").upper()


def _bits(quantisation: Settings) -> tuple[int, int]:
    """(bits of a weight, weights that share a scale); 0 where it is not known or not by groups."""
    weights: Any = quantisation
    groups = quantisation.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        first = next(iter(groups.values()))
        weights = first.get("weights") if isinstance(first, Mapping) else {}
    if not isinstance(weights, Mapping):
        return 0, 0
    bits = weights.get("bits") or weights.get("num_bits") or weights.get("w_bit")
    group = weights.get("group_size") or weights.get("q_group_size")
    return (
        bits if isinstance(bits, int) and 0 < bits <= 64 else 0,
        group if isinstance(group, int) and 0 < group <= _LARGEST_GROUP else 0,
    )
