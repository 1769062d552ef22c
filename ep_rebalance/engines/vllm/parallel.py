"""vLLM's groups of ranks, and the nodes that those of the EP group are on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ep_rebalance.config import ConfigurationError
from ep_rebalance.pipeline import PipelineStage
from ep_rebalance.topology import Topology

_UBATCH_OFFSET = "dbo_current_ubatch_token_offset"


def ep_group() -> Any:
    """vLLM's group coordinator."""
    from vllm.distributed.parallel_state import get_ep_group

    return get_ep_group()


def tensor_group() -> Any:
    """vLLM's group coordinator."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group()


def tells_ubatches() -> bool:
    """Whether this vLLM tells where a part of the batch begins (dual-batch overlap); 0.32 does not."""
    from vllm.v1.worker import ubatching

    return hasattr(ubatching, _UBATCH_OFFSET)


def part_of_batch() -> Callable[[], tuple[int, int | None]]:
    """Tells the tokens of the calling thread's part of the batch: where they begin, and where the next part
    does; None in the last part, and outside of a part.
    """
    from vllm.v1.worker import ubatching

    def part() -> tuple[int, int | None]:
        if not ubatching.dbo_enabled():
            return 0, None
        number = ubatching.dbo_current_ubatch_id()
        here, *later = ubatching._CURRENT_CONTEXTS[number : ubatching._NUM_UBATCHES]
        return here.token_offset, later[0].token_offset if later and later[0] else None

    return part


def pipeline_stage() -> PipelineStage:
    """The stage that this process is in. Each has EP groups of its own."""
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    return PipelineStage(pp_rank=group.rank_in_group, pp_size=group.world_size)


def ranks_on_nodes(ranks_per_source: int = 1) -> Topology:
    """Which node each rank is on. Collective.

    ranks_per_source: see `Topology`.
    """
    from vllm.distributed.parallel_state import in_the_same_node_as

    group = ep_group()
    nodes = [-1] * group.world_size
    for rank in range(group.world_size):
        # Each call is a collective, and its answer the same on all ranks: so they skip the same ones.
        if nodes[rank] < 0:
            same = in_the_same_node_as(group.cpu_group, rank)
            number = max(nodes) + 1
            nodes = [number if here else node for here, node in zip(same, nodes, strict=True)]
    return Topology(node_of_rank=tuple(nodes), ranks_per_source=ranks_per_source)


def ranks_per_node() -> int:
    """How many ranks each node has. Collective.

    Raises ConfigurationError unless ranks are numbered node by node, with equally many on each.
    """
    nodes = ranks_on_nodes().node_of_rank
    size = nodes.count(0)
    if nodes != tuple(rank // size for rank in range(len(nodes))):
        raise ConfigurationError(
            f"data_plane.group_by_node needs equally many ranks on each node, node by node; they are on "
            f"nodes {list(nodes)}.",
            "drop data_plane.group_by_node.",
        )
    return size
