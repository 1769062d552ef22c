"""vllm-ascend: the expert map of its static balancer (`expert_map_path`).

Source: vllm-project/vllm-ascend, examples/eplb/eplb_strategy.py (`save_matrix_to_json`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ep_rebalance.formats.contents import FormatError, read_text, suffix_of
from ep_rebalance.formats.format import (
    NumberedPlacement,
    Reading,
    Writing,
    replace_text,
)
from ep_rebalance.formats.load import slots_of
from ep_rebalance.formats.slots import placement_of
from ep_rebalance.placement import Placement


class _Device(msgspec.Struct):
    device_id: int
    device_expert: list[int]


class _Layer(msgspec.Struct):
    layer_id: int
    device_count: int
    device_list: list[_Device]


class _ExpertMap(msgspec.Struct):
    moe_layer_count: int
    layer_list: list[_Layer]


def recognises(path: Path) -> bool:
    """Recognises JSON that lists devices."""
    return suffix_of(path) == ".json" and '"device_expert"' in read_text(path)


def write_placement(
    path: Path, placement: Placement, moe_layers: Sequence[int], writing: Writing
) -> None:
    """Write the layers of the placement alone; dense ones have no entry."""
    replace_text(path, placement_text(placement, moe_layers))


def placement_text(placement: Placement, moe_layers: Sequence[int]) -> str:
    """The expert map of a placement.

    moe_layers: the numbers that the placement's layers have in the model.
    """
    by_rank = (placement.num_layers, placement.num_ranks, placement.slots_per_rank)
    layers: list[dict[str, Any]] = [
        {
            "layer_id": int(layer),
            "device_count": placement.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": slots_S.tolist()}
                for rank, slots_S in enumerate(slots_RS)
            ],
        }
        for layer, slots_RS in zip(moe_layers, placement.slots_LP.reshape(by_rank), strict=True)
    ]
    return json.dumps({"moe_layer_count": placement.num_layers, "layer_list": layers})


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """The placement of an expert map, which holds its ranks and the numbers of its layers. Raises
    FormatError.
    """
    try:
        found = msgspec.json.decode(read_text(path), type=_ExpertMap)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FormatError(path, "", f"is not an expert map ({error}); write it anew") from None
    if not found.layer_list or len(found.layer_list) != found.moe_layer_count:
        raise FormatError(
            path,
            "moe_layer_count",
            f"is {found.moe_layer_count}, for {len(found.layer_list)} layers; mend it",
        )
    ranks = found.layer_list[0].device_count
    rows = []
    for layer in sorted(found.layer_list, key=lambda layer: layer.layer_id):
        devices = sorted(layer.device_list, key=lambda device: device.device_id)
        numbers = list(range(len(devices)))
        if len(devices) != ranks or [d.device_id for d in devices] != numbers:
            raise FormatError(
                path,
                f"layer {layer.layer_id}",
                f"does not list devices 0..{ranks - 1}, each once; write it anew",
            )
        if len({len(device.device_expert) for device in devices}) > 1:
            raise FormatError(
                path,
                f"layer {layer.layer_id}",
                f"does not give {ranks} devices equally many experts; write it anew",
            )
        rows.append([expert for device in devices for expert in device.device_expert])
    slots_LP = slots_of(path, "device_expert", rows)
    placement = placement_of(path, "device_expert", slots_LP, ranks)
    return reading.numbered(path, placement, sorted(layer.layer_id for layer in found.layer_list))
