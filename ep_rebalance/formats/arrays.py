"""Arrays of counts or of expert ids, in the files of `array_files.py`.

`logical_count` is SGLang's name for counts (sglang/srt/eplb/expert_distribution.py, `dump_record`), and
`routed_experts` vLLM's for ids (vllm/outputs.py). What has neither name is one or the other by `--axes`, or
where its shape and its numbers leave no doubt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats import AXES
from ep_rebalance.formats.array_files import NUMPY, TORCH, named_arrays
from ep_rebalance.formats.contents import FormatError, suffix_of
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.layer_counts import load_of_counts
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.formats.token_ids import Tokens, load_of_tokens

_COUNTS = "logical_count"
_IDS = ("routed_experts", "topk_ids")
_MAX_TOP_K = 64
_MAX_MOE_LAYERS = 256
"""More than any model has: a longer axis is not that of layers."""
_LOOKED_AT = 1 << 14
"""Of the first axis."""
_SAME_SUM = 0.01
"""By how much sums of layers may differ: each token passes each layer, but the last ones may be under way."""


def recognises(path: Path) -> bool:
    """Recognises a file by its name."""
    return suffix_of(path) in NUMPY + TORCH


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """The counts of one array, or the tokens of all arrays, whose names match `reading.keys`.

    Raises FormatError, also where it is not certain what an array holds.
    """
    names, first = _chosen(path, reading.keys)
    axes, note = _axes_of(path, names[0], first, reading)
    if "E" in axes:
        if len(names) > 1:
            held = ", ".join(names[:8])
            raise FormatError(
                path, "", f"holds several arrays of counts, {held}; choose with --key"
            )
        whose = "SGLang's" if names[0] == _COUNTS else "the counts of"
        origin = f"converted from {whose} {path.name}"
        wanted = "WLE" if "W" in axes else "LE"
        load = load_of_counts(path, names[0], _moved(first, axes, wanted), reading, origin)
    else:
        source = partial(_tokens, path, reading.keys, frozenset(names), axes)
        load = load_of_tokens(
            path, source, reading, f"converted from the expert ids of {path.name}"
        )
    return load.with_notes((note,)) if note else load


def _chosen(path: Path, keys: str) -> tuple[list[str], NDArray[Any]]:
    """(names, first array): the one named as counts, else those named as ids, else all."""
    found: dict[str, NDArray[Any]] = {}
    names: list[str] = []
    for name, array in named_arrays(path, keys):
        names.append(name)
        if not found or name == _COUNTS or (name in _IDS and _COUNTS not in found):
            found = {name: array}
    if not names:
        if keys == "*":
            raise FormatError(path, "", "holds no array; save arrays of counts or of expert ids")
        raise FormatError(
            path, "", f"holds no array whose name matches {keys!r}; give another --key"
        )
    if "slots_LP" in names:
        reason = "is a state file: a placement, no load; give a TARGET that is no trace, with --to"
        raise FormatError(path, "", reason)
    ((first, array),) = found.items()
    if first == _COUNTS or first in _IDS:
        return [first], array
    return names, array


def _axes_of(path: Path, name: str, array: NDArray[Any], reading: Reading) -> tuple[str, str]:
    """(axes, note for the user) of an array: a word of AXES, its letters in the order of the array."""
    if reading.axes:
        if len(reading.axes) != array.ndim:
            reason = f"has shape {array.shape}, and --axes {reading.axes} names {len(reading.axes)}"
            raise FormatError(path, name, f"{reason}; give each a letter")
        return reading.axes, ""
    if name == _COUNTS:
        return ("LE", "WLE")[array.ndim > 2], ""  # `counts_of` refuses other numbers of axes
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "iuf":
        reason = f"is {array.dtype} {array.shape}, neither counts nor expert ids"
        raise FormatError(path, name, f"{reason}; write counts [layers, experts]")
    if array.ndim == 3 and (name in _IDS or _are_ids(array, reading.experts)):
        return _order_of_ids(path, name, array)
    if name not in _IDS and _adds_up(array):
        return ("LE", "WLE")[array.ndim > 2], ""
    raise FormatError(
        path,
        name,
        f"may be counts or expert ids, {array.shape}; say what its axes are, e.g. --axes "
        + (" or ".join(word for word in AXES if len(word) == array.ndim)),
    )


def _are_ids(array: NDArray[Any], experts: int | None) -> bool:
    """Whether numbers are surely ids: whole, few for each token, and most of them occur."""
    if array.dtype.kind not in "iu" or array.shape[-1] > _MAX_TOP_K:
        return False
    if experts is not None:
        return bool(experts != array.shape[-1])
    different = np.unique(array[:_LOOKED_AT])
    return bool(2 * different.size > int(different[-1]))


def _order_of_ids(path: Path, name: str, array: NDArray[Any]) -> tuple[str, str]:
    first, second = (size > _MAX_MOE_LAYERS for size in array.shape[:2])
    if first and second:
        reason = f"has shape {array.shape}, and no axis can be that of layers"
        raise FormatError(path, name, f"{reason}; give --axes TLK or LTK if one is")
    if second:
        return "LTK", f"{name}, {array.shape}, is taken as [layers, tokens, top-k]"
    if first:
        return "TLK", ""
    return (
        "TLK",
        f"{name}, {array.shape}, is taken as [tokens, layers, top-k]; if not, give --axes LTK",
    )


def _adds_up(array: NDArray[Any]) -> bool:
    """Whether all layers with tokens have as many, as those of counts [(W,) L, E] have."""
    sums = array.sum(axis=-1, dtype=np.float64).reshape(-1, array.shape[-2])
    most = sums.max(axis=1, keepdims=True)
    return bool(((sums == 0) | (sums >= (1 - _SAME_SUM) * most)).all())


def _tokens(path: Path, keys: str, names: frozenset[str], axes: str) -> Iterator[Tokens]:
    for name, array in named_arrays(path, keys):
        if name not in names:
            continue
        if array.ndim != len(axes):
            reason = f"has shape {array.shape}, unlike the first array; choose with --key"
            raise FormatError(path, name, reason)
        ids = _moved(array, axes, "TLK" if "L" in axes else "TK")
        yield Tokens(name=name, ids_TLK=ids if "L" in axes else ids[:, None])


def _moved(array: NDArray[Any], axes: str, wanted: str) -> NDArray[Any]:
    return array.transpose([axes.index(letter) for letter in wanted])
