"""Slots over ranks, and ranks over nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroups:
    """Groups for sending a token once to each node: between the ranks of equal place in their nodes,
    and within the node. Ranks are numbered node by node, with equally many in each.
    """

    between: dist.ProcessGroup
    within: dist.ProcessGroup
    ranks_per_node: int

    @classmethod
    def create(cls, group: dist.ProcessGroup, ranks_per_node: int) -> NodeGroups:
        """Collective: every rank of `group` makes all groups, in the same order.

        Raises ValueError if the ranks do not divide into nodes of that size.
        """
        members = dist.get_process_group_ranks(group)
        if len(members) % ranks_per_node:
            raise ValueError(f"{len(members)} ranks do not divide into nodes of {ranks_per_node}")
        nodes = [members[i : i + ranks_per_node] for i in range(0, len(members), ranks_per_node)]
        places = [list(ranks) for ranks in zip(*nodes, strict=True)]
        within, _ = dist.new_subgroups_by_enumeration(nodes)
        between, _ = dist.new_subgroups_by_enumeration(places)
        return cls(between=between, within=within, ranks_per_node=ranks_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Equally many slots on each rank of a group, in the order of its ranks.

    nodes: None, unless tokens are to be sent once to each node.
    """

    group: dist.ProcessGroup
    slots_per_rank: int
    nodes: NodeGroups | None = None
