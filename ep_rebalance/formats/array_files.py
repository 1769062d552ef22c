"""Files of arrays: `.npy`, `.npz`, and what `torch.save` writes. Loaded without pickles and without code."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.contents import (
    MAX_ARRAY_BYTES,
    FormatError,
    check_growth,
    check_unpacked_size,
    open_contents,
    suffix_of,
)

NUMPY = (".npy", ".npz")
TORCH = (".pt", ".pth")
_FOLDER = 0x10
"""An attribute of MS-DOS."""


def named_arrays(path: Path, keys: str = "*") -> Iterator[tuple[str, NDArray[Any]]]:
    """(name, array) of all arrays whose names match a pattern, in the order of the file.

    Of a `.npz` only one is in memory at a time. What lies alone in a file matches any pattern, and is named
    `array`. Raises FormatError.
    """
    load = _of_torch if suffix_of(path) in TORCH else _of_numpy
    with open_contents(path, MAX_ARRAY_BYTES) as file:
        for name, array in load(path, file, keys):
            if array.nbytes > MAX_ARRAY_BYTES:
                # It may be a view of a few bytes, repeated without end.
                reason = f"has shape {array.shape}, more than {MAX_ARRAY_BYTES} bytes"
                raise FormatError(path, name, reason)
            check_growth(path, name, array.nbytes)
            yield name, array


def _of_numpy(path: Path, file: IO[bytes], keys: str) -> Iterator[tuple[str, NDArray[Any]]]:
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            yield "array", found
            return
        check_unpacked_size(path, found.zip)
        for name in found.files:
            if not fnmatchcase(name, keys):
                continue
            # Of what does not begin as an array the bytes, such as of a note beside them.
            if isinstance(held := found[name], np.ndarray):
                yield name, held
            elif f"{name}.npy" in found.zip.namelist():
                raise ValueError(f"{name}.npy does not begin as an array")
    except FormatError:
        raise
    except Exception as error:  # a dozen kinds for damaged files, OSError among them
        raise FormatError(path, "", _damaged("numpy.save or numpy.savez makes", error)) from None


def _of_torch(path: Path, file: IO[bytes], keys: str) -> Iterator[tuple[str, NDArray[Any]]]:
    try:
        import torch
    except ImportError:
        raise FormatError(path, "", "needs torch: `pip install torch`, or use a .npz") from None
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                check_unpacked_size(path, archive)
                _check_records(archive)
        file.seek(0)
        found = torch.load(file, weights_only=True, map_location="cpu")
        for name, value in _flat("array", found):
            if isinstance(value, torch.Tensor) and (name == "array" or fnmatchcase(name, keys)):
                yield name, _numbers(value.detach())
    except FormatError:
        raise
    except Exception as error:  # pickle, zipfile and torch raise a dozen kinds, OSError too
        raise FormatError(path, "", _damaged("torch.save makes of tensors", error)) from None


def _check_records(archive: zipfile.ZipFile) -> None:
    """Raises ValueError for a record that torch would not read, and instead take what was in memory: it
    does not look at checksums, and passes over what is marked as a folder (miniz, `mz_zip_reader_extract`).
    """
    for record in archive.infolist():
        folder = record.external_attr & _FOLDER
        if folder or record.compress_size != record.file_size or record.compress_type:
            raise ValueError(f"its record {record.filename} is not stored as a file")
    if damaged := archive.testzip():
        raise ValueError(f"its record {damaged} has another checksum")


def _numbers(tensor: Any) -> NDArray[Any]:
    """Types that NumPy lacks, such as bfloat16, become float32."""
    try:
        return np.asarray(tensor.numpy())
    except TypeError:
        return np.asarray(tensor.float().numpy())


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of a mapping by their keys, those of a list by their places."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            yield str(key), held
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for place, held in enumerate(value):
            yield f"[{place}]", held
    else:
        yield name, value


def _damaged(made: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
    return f"is not what {made} ({reason[:200]}); make it so again"
