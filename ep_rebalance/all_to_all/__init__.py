"""All-to-all: tokens to the ranks that hold their experts, and the outputs back, by `torch.distributed`.

A token is sent once to each rank that holds one of its experts. What comes back depends on `combine`.
With `exact`, one row per expert comes back, and they are summed at the token's own rank in top-k order
and float32, so that the result is the same bits wherever the experts sit. With `fast`, each rank sums
what it computed and returns one row per token.

Each exchange is a module here with an `AllToAll`, and an entry in `ep_rebalance.exchanges`.
"""

from pkgutil import resolve_name

import torch.distributed as dist

from ep_rebalance.all_to_all.dispatched import AllToAll, Combine, Dispatched, Rows
from ep_rebalance.all_to_all.exact_splits import ExactSplits
from ep_rebalance.all_to_all.fixed_capacity import FixedCapacity
from ep_rebalance.all_to_all.layout import Layout, NodeGroups
from ep_rebalance.all_to_all.wire import Payload
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.exchanges import EXCHANGES

__all__ = [
    "AllToAll",
    "Combine",
    "Dispatched",
    "ExactSplits",
    "FixedCapacity",
    "Layout",
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
    """The all-to-all that `data_plane` and `dispatch` ask for.

    nodes: for `data_plane.group_by_node`; else None.
    """
    made_by: type[AllToAll] = resolve_name(EXCHANGES[config.data_plane.buffers].all_to_all)
    layout = Layout(group=group, slots_per_rank=slots_per_rank, nodes=nodes)
    return made_by.create(config, layout)
