"""SGLang: what its expert distribution recorder writes, and what `--init-expert-location` reads.

Sources: sglang/srt/eplb/expert_distribution.py (`dump_record`) and expert_location.py
(`compute_initial_expert_location_metadata`), 0.5.23; sgl-project/sglang issue 6017. Both files hold a row
for every layer of the model; a dense layer's is zeros in a recording, and trivial in a placement.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.contents import FormatError, beginning, read_text, suffix_of
from ep_rebalance.formats.format import (
    NumberedPlacement,
    Reading,
    Writing,
    replace_text,
)
from ep_rebalance.formats.layer_counts import load_of_counts
from ep_rebalance.formats.load import ForeignLoad, slots_of
from ep_rebalance.formats.slots import placement_of
from ep_rebalance.placement import Placement

_MAP = "physical_to_logical_map"


def recognises(path: Path) -> bool:
    """Recognises any JSON."""
    return (
        suffix_of(path) == ".json" or beginning(path, 8).removeprefix(b"\xef\xbb\xbf")[:1] == b"{"
    )


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """`logical_count` of a JSON file. Raises FormatError for anything else. arrays.py reads it in `.pt`."""
    found = _read_json(path)
    if not isinstance(found, dict) or "logical_count" not in found:
        raise FormatError(path, "", _without_counts(found))
    origin = f"converted from SGLang's {path.name}"
    return load_of_counts(path, "logical_count", found["logical_count"], reading, origin)


def _without_counts(found: Any) -> str:
    """What JSON holds instead, and what to do."""
    if isinstance(found, dict) and (_MAP in found or "layer_list" in found):
        return "holds a placement, no load; give a TARGET that is no trace, with --to"
    if isinstance(found, list):
        return 'is a list; name it, as in {"logical_count": [layers of counts of experts]}'
    held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
    return (
        f"holds {held[:200] or 'nothing'}, no logical_count; record with "
        "--expert-distribution-recorder-mode stat"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise FormatError(path, place, f"is not JSON ({error.msg}); write it anew") from None
    except RecursionError:
        raise FormatError(
            path, "", "is nested too deeply; write rows of numbers, one for each layer"
        ) from None
    except FormatError:
        raise
    except ValueError:  # a number of too many digits
        raise FormatError(path, "", "has a number of thousands of digits; write it anew") from None


def read_placement(path: Path, reading: Reading) -> NumberedPlacement:
    """`physical_to_logical_map` of a JSON file, with all its layers, numbered from `reading.first_moe_layer`
    on. Raises FormatError.
    """
    num_ranks = reading.ranks_of(path)
    found = _read_json(path)
    if not isinstance(found, dict) or _MAP not in found:
        held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        reason = (
            f"holds {held[:200] or 'nothing'}, no {_MAP}; `ep-rebalance plan` makes a placement"
        )
        raise FormatError(path, "", reason)
    slots_LP = slots_of(path, _MAP, found[_MAP])
    return reading.numbered(path, placement_of(path, _MAP, slots_LP, num_ranks))


def write_placement(
    path: Path, placement: Placement, moe_layers: Sequence[int], writing: Writing
) -> None:
    """Write all layers of the model. Raises ValueError if it has fewer than the placement reaches."""
    least = moe_layers[-1] + 1
    if writing.layers is not None and writing.layers < least:
        raise ValueError(
            f"--layers {writing.layers}: the placement reaches layer {least - 1}; give --layers {least} "
            "or more"
        )
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
