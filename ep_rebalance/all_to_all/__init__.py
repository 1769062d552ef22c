"""Tokens to the ranks that hold their experts, and the outputs back, over `torch.distributed`.

A token is sent once to each rank that holds one of its experts. What comes back depends on
`combine`: `exact` returns one row per expert and sums at the token's own rank in top-k order and
float32, so that the result is the same bits wherever the experts sit; `fast` sums at the rank that
computed and returns one row per token.

Two shapes. `ExactSplits` sends just the rows there are; their number is read on the host, so it is for
eager execution. `FixedCapacity` sends buffers of one size, with further rounds for what does not fit.
"""

import torch.distributed as dist

from ep_rebalance.all_to_all.dispatched import AllToAll, Combine, Dispatched, Rows
from ep_rebalance.all_to_all.exact_splits import ExactSplits, NodeGroups
from ep_rebalance.all_to_all.fixed_capacity import FixedCapacity
from ep_rebalance.all_to_all.wire import Payload
from ep_rebalance.config import RebalanceConfig

__all__ = [
    "AllToAll",
    "Combine",
    "Dispatched",
    "ExactSplits",
    "FixedCapacity",
    "NodeGroups",
    "Payload",
    "Rows",
    "make_all_to_all",
]


def make_all_to_all(
    config: RebalanceConfig,
    *,
    group: dist.ProcessGroup,
    slots_per_rank: int,
    nodes: NodeGroups | None = None,
) -> AllToAll:
    """What `data_plane` and `dispatch` name. nodes: for `data_plane.group_by_node`."""
    plane, combine = config.data_plane, config.dispatch.combine
    if plane.buffers == "fixed":
        return FixedCapacity(
            group=group,
            slots_per_rank=slots_per_rank,
            combine=combine,
            capacity_factor=plane.capacity_factor,
            payload=plane.payload,
        )
    return ExactSplits(
        group=group,
        slots_per_rank=slots_per_rank,
        combine=combine,
        payload=plane.payload,
        nodes=nodes,
    )
