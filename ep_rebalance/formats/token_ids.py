"""Expert ids token by token: arrays [T, L, K] in `.npz` or `.npy` files, which are cut into snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.format import Format, Reading
from ep_rebalance.formats.load import (
    ForeignLoad,
    FormatError,
    check_array_size,
    check_unpacked_size,
)
from ep_rebalance.regular_files import open_regular

_MAX_EXPERTS = 1 << 16
_MAX_COUNTS = 1 << 26
"""Of one snapshot: a hundred layers of all these experts are a tenth of it."""


def recognises(path: Path) -> bool:
    """Recognises a file by its name."""
    return path.suffix in (".npz", ".npy")


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """The tokens of all arrays whose names match `reading.keys`, in the order of the file.

    Only one array is in memory at a time. Raises FormatError.
    """
    check_array_size(path)
    keys = reading.keys
    layers = top_k = experts = tokens = 0
    # Everything is checked and measured first, since counts are read only as they are asked for.
    for name, ids_TLK in _arrays(path, keys):
        _check(path, name, ids_TLK)
        if layers and (layers, top_k) != ids_TLK.shape[1:]:
            raise FormatError(
                path, name, f"has shape {ids_TLK.shape}, unlike [T, {layers}, {top_k}]"
            )
        layers, top_k = ids_TLK.shape[1:]
        experts, tokens = max(experts, int(ids_TLK.max()) + 1), tokens + len(ids_TLK)
    if not tokens:
        raise FormatError(path, "", f"holds no array whose name matches {keys!r}")
    if layers * experts > _MAX_COUNTS:
        raise FormatError(path, "", f"has {layers} layers of {experts} experts, too many to count")
    return ForeignLoad(
        counts=_Snapshots(path, keys, experts, reading.tokens_per_snapshot),
        layers=layers,
        experts=experts,
        moe_layers=(),
        origin=f"converted from the expert ids of {path.name}",
        top_k=top_k,
    )


class _Snapshots:
    """Counts of each snapshot. Each iteration reads the file again.

    Tokens at the end that do not fill a snapshot are left out.
    """

    def __init__(self, path: Path, keys: str, experts: int, tokens: int) -> None:
        self._path, self._keys, self._experts, self._tokens = path, keys, experts, tokens

    def __iter__(self) -> Iterator[NDArray[np.uint32]]:
        rest: NDArray[Any] | None = None
        for _, ids_TLK in _arrays(self._path, self._keys):
            joined = ids_TLK if rest is None else np.concatenate([rest, ids_TLK])
            whole = len(joined) // self._tokens * self._tokens
            for begin in range(0, whole, self._tokens):
                yield self._count(joined[begin : begin + self._tokens])
            rest = joined[whole:]

    def _count(self, ids_TLK: NDArray[Any]) -> NDArray[np.uint32]:
        layers = ids_TLK.shape[1]
        cells = ids_TLK.astype(np.int64) + self._experts * np.arange(layers)[:, None]
        counts = np.bincount(cells.ravel(), minlength=layers * self._experts)
        return counts.reshape(layers, self._experts).astype(np.uint32)


def _arrays(path: Path, keys: str) -> Iterator[tuple[str, NDArray[Any]]]:
    with open_regular(path) as file:
        try:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                yield path.name, found
                return
            check_unpacked_size(path, found.zip)
            for name in found.files:
                if fnmatchcase(name, keys):
                    yield name, found[name]
        except FormatError:
            raise
        except Exception as error:  # a dozen kinds for damaged files, OSError among them
            raise FormatError(path, "", f"is not a file of arrays ({error})") from None


def _check(path: Path, name: str, ids_TLK: NDArray[Any]) -> None:
    if ids_TLK.ndim != 3 or 0 in ids_TLK.shape or ids_TLK.dtype.kind not in "iu":
        raise FormatError(
            path, name, f"is {ids_TLK.dtype} {ids_TLK.shape}, not integers [tokens, layers, top-k]"
        )
    if ids_TLK.min() < 0 or ids_TLK.max() >= _MAX_EXPERTS:
        raise FormatError(path, name, f"has expert ids {ids_TLK.min()} to {ids_TLK.max()}")


FORMAT = Format(
    name="token-ids",
    summary="expert ids token by token, arrays of tokens, layers and top-k in .npz or .npy",
    recognises=recognises,
    read_load=read_load,
)
