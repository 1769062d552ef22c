"""The head of a trace: a magic text, length and checksum of the JSON, then the JSON itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from ep_rebalance.foreign_json import decoded
from ep_rebalance.load.dates import has_date
from ep_rebalance.load.trace.checksums import checksum_of_head, version_1_checksum_of_head
from ep_rebalance.load.trace.error import COPY_AGAIN, TraceError
from ep_rebalance.load.trace.records import FORMAT, FORMAT_VERSION, TraceHead
from ep_rebalance.load.window import PHASES
from ep_rebalance.placement import MAX_LAYERS, can_be_shared, fits_memory
from ep_rebalance.printable import printable
from ep_rebalance.topology import LINKS

READABLE_VERSIONS = (1, FORMAT_VERSION)

MAGIC = b"EPTRACE\n"
_MAX_HEAD_BYTES = 1 << 20
_MAX_RECORD_BYTES = 64 << 20
_MAX_BYTES = 1 << 40
"""Of an expert, so that those of a plan can be added up."""
_FASTEST, _LONGEST_ROUND = 1e18, 1e6
"""Bytes per second of a link, and seconds of a round. Beyond them nothing can be computed."""

_RENAMED_SETTINGS = (("data_plane", "shape", "buffers"),)
"""(section, earlier name, present name)."""


def encode_head(head: TraceHead) -> bytes:
    """The bytes with which a trace begins. Padded, so that records lie at multiples of 8 bytes."""
    text = msgspec.json.encode(printable(msgspec.to_builtins(head)))
    text += b" " * (-len(text) % 8)
    sizes = np.array([len(text), checksum_of_head(text)], "<u8")
    return MAGIC + sizes.tobytes() + text


def read_head(path: Path, file: IO[bytes]) -> tuple[TraceHead, int]:
    """(head, offset of the first record). Raises TraceError."""
    start = file.read(24)
    if len(start) < 24 or not start.startswith(MAGIC):
        raise TraceError(
            path, 0, "this is not a trace of ep_rebalance; `ep-rebalance convert` makes one"
        )
    length, checksum = (int(word) for word in np.frombuffer(start, "<u8", 2, 8))
    if length > _MAX_HEAD_BYTES or length % 8:
        raise TraceError(path, 8, f"a head of {length} bytes cannot be; {COPY_AGAIN}")
    text = file.read(length)
    if len(text) < length:
        raise TraceError(path, 24, f"the head is cut off; {COPY_AGAIN}")
    whole = checksum == checksum_of_head(text)
    # The version, which says how the checksum is made, lies in the text that is not trusted yet.
    if not whole and checksum != version_1_checksum_of_head(text):
        raise TraceError(path, 24, f"the head's checksum is wrong; {COPY_AGAIN}")
    try:
        head = decoded(text, TraceHead)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TraceError(path, 24, f"the head does not say what a head must ({error})") from None
    if not whole and head.version != 1:
        raise TraceError(path, 24, "the head's checksum is of another version")
    head = msgspec.structs.replace(head, config=_with_present_names(head.config))
    if reason := fault_of_head(head):
        raise TraceError(path, 24, reason)
    return head, 24 + length


def _with_present_names(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier release recorded, under their present names."""
    parts = {name: dict(part) for name, part in config.items() if isinstance(part, dict)}
    for section, old, new in _RENAMED_SETTINGS:
        if old in parts.get(section, {}):
            parts[section][new] = parts[section].pop(old)
    return config | parts


def fault_of_head(head: TraceHead) -> str:
    """Why this head cannot be right, or ""."""
    if head.format != FORMAT or head.version not in READABLE_VERSIONS:
        return (
            f"format {head.format!r} version {head.version}; this ep-rebalance reads {FORMAT!r} "
            f"versions 1 to {FORMAT_VERSION}, so use the one that wrote it ({head.plugin_version})"
        )
    return _fault_of_sizes(head) or _fault_of_numbers(head)


def _fault_of_sizes(head: TraceHead) -> str:
    sizes = (head.layers, head.experts, head.top_k, head.ep_size, head.slots)
    shared = can_be_shared(head.slots, head.experts, head.ep_size)
    possible = min(sizes) >= 1 and shared and head.top_k <= head.experts <= head.slots
    if not possible or not fits_memory(head.layers, head.slots, head.ep_size):
        return (
            f"{head.layers} layers, {head.experts} experts, top {head.top_k}, {head.slots} slots on "
            f"{head.ep_size} ranks cannot be"
        )
    largest = head.layers * max(4 * len(PHASES) * head.experts, 12 * head.slots)
    if largest > _MAX_RECORD_BYTES:
        return f"records of {largest} bytes, more than {_MAX_RECORD_BYTES}"
    if len(head.node_of_rank) != head.ep_size or len(head.expert_bytes) != head.layers:
        return "its lists of ranks and layers are not as long as it says"
    if head.moe_layers and len(head.moe_layers) != head.layers:
        return f"numbers of {len(head.moe_layers)} layers, where there are {head.layers}"
    return ""


def _fault_of_numbers(head: TraceHead) -> str:
    """Of a head whose lists are as long as they must be."""
    if not all(0 <= node < head.ep_size for node in head.node_of_rank):
        return f"nodes must have numbers from 0, below the {head.ep_size} ranks"
    sizes = (*head.expert_bytes, head.hidden_size)
    if min(sizes) < 0 or max(sizes) > _MAX_BYTES:
        return "an expert of such a size cannot be"
    numbers = (-1, *head.moe_layers, MAX_LAYERS)
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        return f"numbers of layers must rise from 0, and stay below {MAX_LAYERS}"
    if not has_date(head.started):
        return f"it cannot have been started at {head.started}"
    links = head.bytes_per_second
    fast = not links or (len(links) == len(LINKS) and 1.0 <= min(links) <= max(links) <= _FASTEST)
    if not fast or not 0.0 <= head.round_seconds <= _LONGEST_ROUND:
        return (
            f"links of {links} bytes per second, with {head.round_seconds} s for a round, cannot be"
        )
    return ""
