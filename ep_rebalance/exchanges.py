"""Exchanges: how our all-to-all takes tokens to their experts and the outputs back (`data_plane.buffers`).

An entry is all that is known of an exchange: settings, checks at start and their texts follow from it. This
module is below the settings, so an entry names its class and does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One way to exchange tokens between ranks.

    name: in the settings. summary: what it does, a clause without a semicolon.
    all_to_all: `module:Class` of an `all_to_all.dispatched.AllToAll`.
    in_graphs: when it can be part of a CUDA graph: never, since it reads on the host how many rows there
        are; where all ranks hold equally many tokens; always.
    by_node: whether it can send a token once to each node (`data_plane.group_by_node`).
    eight_bits: whether it can send hidden states as 8-bit floats (`data_plane.payload: fp8`).
    """

    name: str
    summary: str
    all_to_all: str
    in_graphs: Literal["never", "equal tokens", "always"] = "never"
    by_node: bool = False
    eight_bits: bool = False


_ENTRIES = (
    Exchange(
        name="exact",
        summary="sends the rows there are and reads their number on the host",
        all_to_all="ep_rebalance.all_to_all.exact_splits:ExactSplits",
        by_node=True,
        eight_bits=True,
    ),
    Exchange(
        name="fixed",
        summary="sends buffers of one size, for CUDA graphs, and further rounds for what does not fit",
        all_to_all="ep_rebalance.all_to_all.fixed_capacity:FixedCapacity",
        in_graphs="equal tokens",
        eight_bits=True,
    ),
)

EXCHANGES: Mapping[str, Exchange] = MappingProxyType({one.name: one for one in _ENTRIES})
