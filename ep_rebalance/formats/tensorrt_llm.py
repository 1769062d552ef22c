"""TensorRT-LLM: the configuration of its MoE load balancer, and its expert statistics.

Source: NVIDIA/TensorRT-LLM, examples/wide_ep/ep_load_balancer. The configuration is YAML with `num_slots`,
`initial_global_assignments` by layer number, and `layer_updates_per_iter` (0 keeps the placement).
EXPERT_STATISTIC_PATH is a folder with meta_info.json and a `rankN.safetensors` from each rank, which holds
the counts of an iteration and a layer under the name `ITERATION_LAYER`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ep_rebalance.formats.contents import (
    MAX_ARRAY_BYTES,
    FormatError,
    open_contents,
    read_text,
    suffix_of,
)
from ep_rebalance.formats.format import (
    NumberedPlacement,
    Reading,
    Writing,
    replace_text,
)
from ep_rebalance.formats.load import ForeignLoad, counts_of, slots_of
from ep_rebalance.formats.slots import placement_of
from ep_rebalance.placement import Placement

META = "meta_info.json"
_ROWS = "initial_global_assignments"
_MAX_YAML_BYTES = 2 << 20
"""A thousand slots in each of a hundred layers are half a megabyte; PyYAML reads it in seconds."""
_RANK_FILE = re.compile(r"rank\d+\.safetensors")
_KEY = re.compile(r"([0-9]{1,18})_([0-9]{1,18})")


def recognises(path: Path) -> bool:
    """Recognises folders (statistics) and YAML files (a placement)."""
    return path.is_dir() or suffix_of(path) in (".yaml", ".yml")


def read_load(folder: Path, reading: Reading) -> ForeignLoad:
    """The statistics in a folder, with a snapshot for each iteration. Raises FormatError."""
    if not folder.is_dir():
        raise FormatError(folder, "", "is not a folder of statistics")
    try:
        meta = json.loads(read_text(folder / META))
        top_k = int(meta["num_experts_per_token"])
    except FormatError:
        raise
    except (RecursionError, KeyError, TypeError, ValueError, OverflowError):
        reason = "has no num_experts_per_token; copy the whole EXPERT_STATISTIC_PATH"
        raise FormatError(folder / META, "", reason) from None
    counts = _summed(folder)
    iterations, layers = ({key[part] for key in counts} for part in (0, 1))
    if len(counts) != len(iterations) * len(layers):
        raise FormatError(
            folder, "", "lacks layers in some iterations; copy the files of all ranks"
        )
    moe_layers = reading.numbers_of(folder, len(layers), sorted(layers))
    counts_SLE = counts_of(
        folder, "counts", [[counts[i, layer] for layer in moe_layers] for i in sorted(iterations)]
    )
    reading.check_experts(folder, "counts", counts_SLE.shape[2])
    return ForeignLoad(
        counts=list(counts_SLE),
        layers=len(moe_layers),
        experts=counts_SLE.shape[2],
        moe_layers=moe_layers,
        origin=f"converted from TensorRT-LLM's statistics in {folder.name}",
        top_k=top_k,
    )


def _summed(folder: Path) -> dict[tuple[int, int], NDArray[Any]]:
    """Counts [E] by iteration and layer, summed over all ranks."""
    files = [path for path in sorted(folder.iterdir()) if _RANK_FILE.fullmatch(path.name)]
    counts: dict[tuple[int, int], NDArray[Any]] = {}
    for path in files:
        for name, counts_E in _tensors(path).items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise FormatError(
                    path, name, "is not named ITERATION_LAYER; copy the files as written"
                )
            key = int(match[1]), int(match[2])
            if key in counts and counts[key].shape != counts_E.shape:
                raise FormatError(path, name, f"has {counts_E.shape} counts, unlike other ranks")
            # Wider: counts of a long recording fill 32 bits on each rank, and their sum would wrap around.
            whole = counts_E.dtype.kind in "iu"
            counts[key] = counts_E.astype(np.int64 if whole else np.float64) + counts.get(key, 0)
    if not counts:
        reason = "holds no rankN.safetensors with counts; name TensorRT-LLM's EXPERT_STATISTIC_PATH"
        raise FormatError(folder, "", reason)
    return counts


def _tensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        from safetensors.numpy import load
    except ImportError:
        raise FormatError(path, "", "needs safetensors: `pip install safetensors`") from None
    with open_contents(path, MAX_ARRAY_BYTES) as file:
        data = file.read()
    try:
        found: dict[str, NDArray[Any]] = load(data)
    except Exception as error:  # safetensors has an exception of its own
        raise FormatError(path, "", f"is not a file of tensors ({error}); copy it again") from None
    return found


def write_placement(
    path: Path, placement: Placement, moe_layers: Sequence[int], writing: Writing
) -> None:
    """Write the layers of the placement alone; dense ones have no entry."""
    replace_text(path, placement_text(placement, moe_layers))


def placement_text(placement: Placement, moe_layers: Sequence[int]) -> str:
    """The configuration that serves a placement and keeps it.

    moe_layers: the numbers that the placement's layers have in the model.
    """
    assignments = {
        int(layer): slots_P.tolist()
        for layer, slots_P in zip(moe_layers, placement.slots_LP, strict=True)
    }
    settings = {
        "num_slots": placement.num_slots,
        "initial_global_assignments": assignments,
        "layer_updates_per_iter": 0,
    }
    text: str = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=10_000)
    return text


class _PlainLoader(yaml.SafeLoader):
    """`yaml.safe_load` without aliases, by which a few lines may stand for any number of slots."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.current_event.start_mark
            raise yaml.MarkedYAMLError(problem="aliases; write out each row", problem_mark=mark)
        return super().compose_node(parent, index)


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """The placement of a configuration, which numbers its layers. Raises FormatError."""
    num_ranks = reading.ranks_of(path)
    try:
        found = _PlainLoader(read_text(path, _MAX_YAML_BYTES)).get_single_data()
    except (FormatError, OSError):
        raise
    except Exception as error:  # ValueError, AttributeError and RecursionError beside PyYAML's own
        raise FormatError(path, "", f"is not YAML ({_told(error)}); write it anew") from None
    rows = found.get(_ROWS) if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not rows:
        reason = f"holds no {_ROWS}; `ep-rebalance plan --to tensorrt-llm` writes them"
        raise FormatError(path, "", reason)
    if not all(isinstance(layer, int) for layer in rows):
        raise FormatError(
            path, _ROWS, "is not by layer number; give each row its layer's, as in 3: [0, 1]"
        )
    layers = tuple(sorted(rows))
    slots_LP = slots_of(path, _ROWS, [rows[layer] for layer in layers])
    if found.get("num_slots", slots_LP.shape[1]) != slots_LP.shape[1]:
        raise FormatError(
            path, "num_slots", f"is not the {slots_LP.shape[1]} of the layers; mend it"
        )
    return reading.numbered(path, placement_of(path, _ROWS, slots_LP, num_ranks), layers)


def _told(error: Exception) -> str:
    """PyYAML's errors are several lines long."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + (str(getattr(error, "problem", "")) or str(error).partition("\n")[0])
