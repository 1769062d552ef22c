"""SGLang: what its expert distribution recorder writes, and what `--init-expert-location` reads.

Sources: sglang/srt/eplb/expert_distribution.py (`dump_record`) and expert_location.py
(`compute_initial_expert_location_metadata`), 0.5.23; sgl-project/sglang issue 6017. Both files hold a row
for every layer of the model; a dense layer's is zeros in a recording, and trivial in a placement.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.format import (
    Format,
    NumberedPlacement,
    Reading,
    Writing,
    beginning,
    replace_text,
)
from ep_rebalance.formats.load import (
    ForeignLoad,
    FormatError,
    check_array_size,
    check_unpacked_size,
    counts_of,
    read_text,
    slots_of,
)
from ep_rebalance.placement import Placement, PlacementError


def recognises(path: Path) -> bool:
    """Recognises any JSON, and files of tensors."""
    return path.suffix in (".json", ".pt") or beginning(path, 1) == b"{"


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """`logical_count` of a JSON file, or of a `.pt` recording in the modes stat and stat_approx.

    Raises FormatError for anything else, recordings of single passes and tokens included.
    """
    counts_SLE = counts_of(path, "logical_count", _logical_count(path))
    moe = np.flatnonzero(counts_SLE.any(axis=(0, 2)))
    if not moe.size:
        raise FormatError(path, "logical_count", "is all zero")
    return ForeignLoad(
        counts=list(counts_SLE[:, moe]),
        layers=len(moe),
        experts=counts_SLE.shape[2],
        moe_layers=tuple(int(layer) for layer in moe),
        origin=f"converted from SGLang's {path.name}",
    )


def _logical_count(path: Path) -> Any:
    found = _read_pt(path) if path.suffix == ".pt" else _read_json(path)
    if isinstance(found, dict) and "logical_count" in found:
        return found["logical_count"]
    held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
    raise FormatError(
        path,
        "",
        f"holds {held[:200]}, no logical_count; record with "
        "--expert-distribution-recorder-mode stat",
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise FormatError(path, f"line {error.lineno}", f"is not JSON ({error.msg})") from None
    except RecursionError:
        raise FormatError(path, "", "is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:  # a number of too many digits
        raise FormatError(path, "", f"is not JSON ({error})") from None


def _read_pt(path: Path) -> Any:
    """Tensors become lists of numbers. Needs torch."""
    check_array_size(path)
    try:
        import torch
    except ImportError:
        raise FormatError(path, "", "needs torch, which is not installed here") from None
    with path.open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    check_unpacked_size(path, archive)
            file.seek(0)
            found = torch.load(file, weights_only=True, map_location="cpu")
        except FormatError:
            raise
        except Exception as error:  # pickle, zipfile and torch raise a dozen kinds, OSError too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FormatError(path, "", f"is not a recording of tensors alone ({reason})") from None
    if not isinstance(found, dict):
        return found
    return {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
    }


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """`physical_to_logical_map` of a JSON file, with all its layers, numbered from `reading.first_moe_layer`
    on. Raises FormatError.
    """
    num_ranks = reading.ranks_of(path)
    found = _read_json(path)
    if not isinstance(found, dict) or "physical_to_logical_map" not in found:
        raise FormatError(path, "", "holds no physical_to_logical_map")
    slots_LP = slots_of(path, "physical_to_logical_map", found["physical_to_logical_map"])
    try:
        placement = Placement(slots_LP, int(slots_LP.max()) + 1, num_ranks)
    except PlacementError as error:
        raise FormatError(path, "physical_to_logical_map", str(error)) from None
    return reading.numbered(placement)


def write_placement(
    path: Path, placement: Placement, moe_layers: Sequence[int], writing: Writing
) -> None:
    """Write all layers of the model. Raises ValueError if it has fewer than the placement reaches."""
    least = moe_layers[-1] + 1
    if writing.layers is not None and writing.layers < least:
        raise ValueError(f"--layers {writing.layers}: the placement reaches layer {least - 1}")
    replace_text(path, placement_text(placement, moe_layers, writing.layers or least))


def placement_text(placement: Placement, moe_layers: Sequence[int], num_layers: int) -> str:
    """A file for `--init-expert-location`.

    moe_layers: the numbers that the placement's layers have in the model.
    num_layers: number of the model's layers. Those that are not in the placement get the trivial row that
        SGLang itself would give them.
    """
    experts, slots = placement.num_experts, placement.num_slots
    trivial_P: NDArray[np.int64] = np.arange(slots) % experts
    rows = [trivial_P.tolist()] * num_layers
    for layer, slots_P in zip(moe_layers, placement.slots_LP, strict=True):
        rows[layer] = slots_P.tolist()
    return json.dumps({"physical_to_logical_map": rows})


FORMAT = Format(
    name="sglang",
    summary="SGLang's logical_count in JSON or .pt, or its --init-expert-location",
    recognises=recognises,
    read_load=read_load,
    read_placement=read_placement,
    write_placement=write_placement,
)
