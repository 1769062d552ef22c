"""Slots over ranks, and ranks over nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroups:
    """Process groups for sending a token once to each node.

    between: the ranks that have this rank's place in their nodes.
    within: the ranks of this rank's node.

    Ranks are numbered node by node, with equally many on each.
    """

    between: dist.ProcessGroup
    within: dist.ProcessGroup
    ranks_per_node: int

    @classmethod
    def create(cls, group: dist.ProcessGroup, ranks_per_node: int) -> NodeGroups:
        """Groups for the nodes of `group`. Collective.

        Raises ValueError if the ranks do not divide into nodes of that size.
        """
        # Torch requires that every rank makes all groups, in the same order, also those that it is not in.
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

    nodes: given if tokens are to be sent once to each node.
    """

    group: dist.ProcessGroup
    slots_per_rank: int
    nodes: NodeGroups | None = None
