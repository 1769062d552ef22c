"""State file: the placement and the load on disk, from which a restart begins.

It is one `.npz` file with arrays and a JSON header, written whole or not at all (temporary file, fsync,
rename) and read without pickle. The archive's comment is a digest of all bytes before it, which is
checked before anything is parsed. A file that does not fit the model or the ranks is refused with the
reason, and never overwritten.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import ConfigurationError
from ep_rebalance.placement import Placement, PlacementError

FORMAT = "ep-rebalance-state"
FORMAT_VERSION = 2

_DIGEST_BYTES = 64
_HEX = frozenset(b"0123456789abcdef")
_MAX_BYTES = 1 << 30


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The model and layout that a saved placement belongs to.

    config_hash: hash of the model's configuration, by which a checkpoint that was moved or renamed is
        still the same model.
    moe_layers: L rising numbers, those that the layers have in the engine's model; () if unknown.
    """

    model: str
    config_hash: str
    experts: int
    ep_size: int
    redundant_experts: int
    moe_layers: tuple[int, ...] = ()


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON part of the file."""

    format: str
    version: int
    identity: ModelIdentity
    generation: int
    saved_at: float
    plugin_version: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedState:
    """The content of a state file.

    quotas_LP: float64 [L, P]. The quotas with which `placement` was served.
    load_LE: float64 [L, E], tokens. Per logical expert in the window when the state was saved.
    """

    header: Header
    placement: Placement
    quotas_LP: NDArray[np.float64]
    load_LE: NDArray[np.float64]


def save_state(path: Path, state: SavedState) -> None:
    """Write the file, or replace it atomically. Raises OSError if that fails."""
    arrays: dict[str, Any] = {
        "header": np.frombuffer(msgspec.json.encode(state.header), dtype=np.uint8),
        "slots_LP": state.placement.slots_LP,
        "quotas_LP": state.quotas_LP,
        "load_LE": state.load_LE,
    }
    data = _sealed(arrays)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_state(path: Path, identity: ModelIdentity) -> SavedState | None:
    """The state saved for `identity`, or None if there is no file.

    Raises ConfigurationError for a file that is damaged, is something else, or belongs to another
    model or layout.
    """
    if not path.exists():
        return None
    state = read_state(path)
    _check_identity(path, state.header.identity, identity)
    return state


def read_state(path: Path) -> SavedState:
    """The state in a file, whatever model it belongs to.

    Raises ConfigurationError for a file that is damaged or is something else.
    """
    header, arrays = _read(path)
    identity = header.identity
    try:
        placement = Placement(arrays["slots_LP"], identity.experts, identity.ep_size)
    except PlacementError as error:
        raise _refused(path, f"is damaged: {error}") from None
    return SavedState(
        header=header,
        placement=placement,
        quotas_LP=arrays["quotas_LP"],
        load_LE=arrays["load_LE"],
    )


def check_writable(path: Path) -> None:
    """Raises ConfigurationError if a state file could not be written to `path` later."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is a folder" if path.is_dir() else f"cannot be written in folder {str(folder)!r}"
        raise ConfigurationError(
            f"state.path={str(path)!r} {why}.",
            "name a file in an existing folder that the server may write, or drop state.path.",
        )


def _sealed(arrays: dict[str, Any]) -> bytes:
    """The bytes of the file: an archive that ends with the digest of everything before it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    # An archive's comment is its end; zeros stand in for the digest.
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"0" * _DIGEST_BYTES
    content = buffer.getvalue()[:-_DIGEST_BYTES]
    return content + _digest(content)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _unsealed(path: Path) -> bytes:
    """The bytes of the file, if their digest is right. Raises ValueError otherwise."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        raise ValueError("it is not an archive of arrays")
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not _HEX.issuperset(digest):
        raise ValueError(
            "it does not end with a digest: it was changed, cut off, or saved in format 1 by an "
            "earlier ep-rebalance, and only format 2 is read"
        )
    if _digest(content) != digest:
        raise ValueError("its digest is wrong: it was changed or cut off")
    return data


def _read(path: Path) -> tuple[Header, dict[str, NDArray[Any]]]:
    try:
        archive = np.load(io.BytesIO(_unsealed(path)), allow_pickle=False)
        if sum(part.file_size for part in archive.zip.infolist()) > _MAX_BYTES:
            raise ValueError(f"it unpacks to more than {_MAX_BYTES} bytes")
        arrays = {name: np.asarray(archive[name]) for name in archive.files}
        header = msgspec.json.decode(arrays.pop("header").tobytes(), type=Header)
    except Exception as error:  # zipfile and numpy raise a dozen kinds for damaged files
        raise _refused(path, f"is no readable state file ({error})") from None
    if header.format != FORMAT or header.version != FORMAT_VERSION:
        raise _refused(path, f"has format {header.format!r} version {header.version}")
    if missing := {"slots_LP", "quotas_LP", "load_LE"} - arrays.keys():
        raise _refused(path, f"lacks {', '.join(sorted(missing))}")
    if not arrays["slots_LP"].shape == arrays["quotas_LP"].shape:
        raise _refused(path, "has slots and quotas of different shapes")
    return header, arrays


def _check_identity(path: Path, saved: ModelIdentity, wanted: ModelIdentity) -> None:
    if saved.config_hash != wanted.config_hash:
        raise _refused(path, f"was saved for model {saved.model!r}, not {wanted.model!r}")
    for field in ("experts", "ep_size", "redundant_experts"):
        if getattr(saved, field) != getattr(wanted, field):
            raise _refused(
                path,
                f"was saved with {field}={getattr(saved, field)}, not {getattr(wanted, field)}",
            )
    if saved.moe_layers and wanted.moe_layers and saved.moe_layers != wanted.moe_layers:
        raise _refused(
            path, f"was saved for layers {list(saved.moe_layers)}, not {list(wanted.moe_layers)}"
        )


def _refused(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"the state file {str(path)!r} {reason}.",
        "delete it, move it away, or name another file in state.path.",
    )
