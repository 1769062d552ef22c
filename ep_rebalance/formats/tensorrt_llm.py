"""TensorRT-LLM: the configuration of its MoE load balancer.

Source: NVIDIA/TensorRT-LLM, examples/wide_ep/ep_load_balancer (`num_slots`,
`initial_global_assignments` by layer number, `layer_updates_per_iter`: 0 keeps the placement).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from ep_rebalance.formats.load import FormatError, counts_of, read_text
from ep_rebalance.placement import Placement, PlacementError

NAME = "tensorrt-llm"


def placement_text(placement: Placement, moe_layers: Sequence[int]) -> str:
    """moe_layers: the model's numbers of the placement's layers."""
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


def read_placement(path: Path, num_ranks: int) -> tuple[Placement, tuple[int, ...]]:
    """The placement and the model's numbers of its layers. Raises FormatError."""
    try:
        found = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise FormatError(path, "", f"is no YAML ({error})") from None
    rows = found.get("initial_global_assignments") if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise FormatError(path, "", "holds no initial_global_assignments")
    if not all(isinstance(layer, int) for layer in rows):
        raise FormatError(path, "initial_global_assignments", "is not by layer number")
    layers = tuple(sorted(rows))
    slots_LP = counts_of(path, "initial_global_assignments", [rows[layer] for layer in layers])[0]
    if found.get("num_slots", slots_LP.shape[1]) != slots_LP.shape[1]:
        raise FormatError(path, "num_slots", f"is not the {slots_LP.shape[1]} slots of the layers")
    try:
        placement = Placement(slots_LP.astype(np.int32), int(slots_LP.max()) + 1, num_ranks)
    except PlacementError as error:
        raise FormatError(path, "initial_global_assignments", str(error)) from None
    return placement, layers
