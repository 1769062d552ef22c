"""State file: the placement and the load on disk, from which a restart begins.

It is one `.npz` file with arrays and a JSON header, written whole or not at all (temporary file, fsync,
rename) and read without pickle. The archive's comment is a digest of all bytes before it, which is
checked before anything is parsed. A file that does not fit the model or the ranks, or whose numbers cannot
be, is refused with the reason, and never overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import ConfigurationError
from ep_rebalance.foreign_json import decoded
from ep_rebalance.load.dates import has_date
from ep_rebalance.load.unfinished import sweep, unfinished
from ep_rebalance.placement import Placement, PlacementError, fits_memory
from ep_rebalance.process_lock import ProcessLock
from ep_rebalance.regular_files import REGULAR, kind_of, read_regular

FORMAT = "ep-rebalance-state"
FORMAT_VERSION = 2

_DIGEST_BYTES = 64
_HEX = frozenset(b"0123456789abcdef")
_MAX_BYTES = 64 << 20
"""A thousand slots in each of a hundred layers are two megabytes."""
_BEGINS = b"PK"
_ARRAYS = ("slots_LP", "quotas_LP", "load_LE")
_MAX_NUMBER = 1 << 53
_MAX_TOKENS = 1e18
"""Of an expert, so that those of a layer can be added up."""


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
    """Write the file, or replace it atomically; of a link its target. Raises OSError if that fails."""
    arrays: dict[str, Any] = {
        "header": np.frombuffer(msgspec.json.encode(state.header), dtype=np.uint8),
        "slots_LP": state.placement.slots_LP,
        "quotas_LP": state.quotas_LP,
        "load_LE": state.load_LE,
    }
    data = _sealed(arrays)
    target = _target(path)
    with unfinished(target.parent, target.name) as (file, temporary), file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, target)
    _sync_folder(target.parent)


def state_lock(path: Path) -> ProcessLock:
    """Of the process that saves to `path`. Raises as `ProcessLock` does."""
    target = _target(path)
    return ProcessLock(
        target.with_name(f".{target.name}.lock"), f"saves its state in {str(path)!r}"
    )


def sweep_unfinished(path: Path) -> None:
    """Delete what saves to `path` have left that were killed half-way."""
    target = _target(path)
    sweep(target.parent, target.name, _BEGINS)


def load_state(path: Path, identity: ModelIdentity) -> SavedState | None:
    """The state saved for `identity`, or None if there is no file.

    Raises ConfigurationError for a file that is damaged, is something else, or belongs to another
    model or layout.
    """
    try:
        if not kind_of(path):
            return None
    except OSError as error:
        raise _refused(path, f"cannot be looked at ({error})") from None
    state = read_state(path)
    _check_identity(path, state.header.identity, identity)
    return state


def read_state(path: Path) -> SavedState:
    """The state in a file, whatever model it belongs to.

    Raises ConfigurationError for a file that is damaged or is something else.
    """
    header, arrays = _read(path)
    identity = header.identity
    if fault := _fault_of_header(header) or _fault_of_slots(arrays["slots_LP"], identity):
        raise _refused(path, f"is damaged: {fault}")
    try:
        placement = Placement(arrays["slots_LP"], identity.experts, identity.ep_size)
    except PlacementError as error:
        raise _refused(path, f"is damaged: {error}") from None
    if fault := _fault_of_quotas(arrays["quotas_LP"], placement) or _fault_of_load(
        arrays["load_LE"], placement
    ):
        raise _refused(path, f"is damaged: {fault}")
    return SavedState(
        header=header,
        placement=placement,
        quotas_LP=arrays["quotas_LP"].astype(np.float64),
        load_LE=arrays["load_LE"].astype(np.float64),
    )


def check_writable(path: Path) -> None:
    """Raises ConfigurationError if a state file could not be written to `path` later."""
    folder = _target(path).parent
    try:
        kind = kind_of(path)
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        kind, writable = f"no path that can be looked at ({error})", False
    if kind in ("", REGULAR) and writable:
        return
    why = f"cannot be written in folder {str(folder)!r}" if kind in ("", REGULAR) else f"is {kind}"
    raise ConfigurationError(
        f"state.path={str(path)!r} {why}.",
        "name a file in an existing folder that the server may write, or drop state.path.",
    )


def _target(path: Path) -> Path:
    """The file itself, where `path` is a link to it."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # such as a NUL in the path
        return path.absolute()


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a loss of power, where the file system can promise that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
    """The bytes of the file, if their digest is right. Raises ValueError or OSError otherwise."""
    data = read_regular(path, _MAX_BYTES)
    if not data.startswith(_BEGINS):
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
        data = _unsealed(path)
        archive = np.load(io.BytesIO(data), allow_pickle=False)
        # No server packs its state, and a packed archive may hold a thousand times what it takes on disk.
        if sum(entry.file_size for entry in archive.zip.infolist()) > len(data):
            raise ValueError(f"it is packed: it unpacks to more than its {len(data)} bytes")
        names = set(archive.files)
        header = decoded(np.asarray(archive["header"]).tobytes(), Header)
        arrays = {name: np.asarray(archive[name]) for name in _ARRAYS if name in names}
    except Exception as error:  # zipfile and numpy raise a dozen kinds for damaged files
        raise _refused(path, f"is no readable state file ({error})") from None
    if header.format != FORMAT or header.version != FORMAT_VERSION:
        raise _refused(path, f"has format {header.format!r} version {header.version}")
    if missing := set(_ARRAYS) - arrays.keys():
        raise _refused(path, f"lacks {', '.join(sorted(missing))}")
    if not arrays["slots_LP"].shape == arrays["quotas_LP"].shape:
        raise _refused(path, "has slots and quotas of different shapes")
    return header, arrays


# What cannot be, though the digest is right: why, or "".


def _fault_of_header(header: Header) -> str:
    identity = header.identity
    sizes = (identity.experts, identity.ep_size, identity.redundant_experts + 1)
    if min(sizes) < 1 or max(sizes) > _MAX_NUMBER:
        return (
            f"{identity.experts} experts, {identity.redundant_experts} of them redundant, on "
            f"{identity.ep_size} ranks cannot be"
        )
    if not 0 <= header.generation <= _MAX_NUMBER:
        return f"generation {header.generation} cannot be"
    if not has_date(header.saved_at):
        return f"it cannot have been saved at {header.saved_at}"
    numbers = identity.moe_layers
    if any(later <= earlier for earlier, later in zip((-1, *numbers), numbers, strict=False)):
        return f"layers {list(numbers)} do not rise from 0"
    return ""


def _fault_of_slots(slots_LP: NDArray[Any], identity: ModelIdentity) -> str:
    """What `Placement` does not look at."""
    if slots_LP.ndim != 2:
        return f"slots must be [layers, slots], got shape {slots_LP.shape}"
    layers, slots = slots_LP.shape
    if slots != identity.experts + identity.redundant_experts:
        return f"{slots} slots for {identity.experts} experts and {identity.redundant_experts} more"
    if not fits_memory(layers, slots, identity.ep_size):
        return f"{layers} layers of {slots} slots on {identity.ep_size} ranks cannot be"
    if identity.moe_layers and len(identity.moe_layers) != layers:
        return f"{layers} layers with {len(identity.moe_layers)} numbers"
    return ""


def _fault_of_quotas(quotas_LP: NDArray[Any], placement: Placement) -> str:
    if quotas_LP.dtype.kind != "f":
        return f"quotas are {quotas_LP.dtype}, not floating-point numbers"
    try:
        placement.check_quotas(quotas_LP.astype(np.float64))
    except PlacementError as error:
        return str(error)
    return ""


def _fault_of_load(load_LE: NDArray[Any], placement: Placement) -> str:
    wanted = (placement.num_layers, placement.num_experts)
    if load_LE.shape != wanted or load_LE.dtype.kind != "f":
        return f"the load is {load_LE.dtype} {load_LE.shape}, not floating-point {wanted}"
    load_LE = load_LE.astype(np.float64)
    if not ((load_LE >= 0.0) & (load_LE <= _MAX_TOKENS)).all():
        return "the load must be numbers of tokens, and not below 0"
    return ""


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
