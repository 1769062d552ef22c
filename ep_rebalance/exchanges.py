"""Exchanges: how our all-to-all takes tokens to their experts and the outputs back (`data_plane.buffers`).

An entry is all there is to know about an exchange: settings, checks at start and their texts follow from
it. This module is a layer below the settings, so an entry names its class and does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One way to exchange tokens between ranks.

    name: what `data_plane.buffers` calls it.
    summary: what it does, a clause without a semicolon.
    all_to_all: `module:Class`. An `all_to_all.dispatched.AllToAll`.
    in_graphs: when it can be part of a CUDA graph: never, because it reads numbers of rows on the host; if
        all ranks hold equally many tokens; always.
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
