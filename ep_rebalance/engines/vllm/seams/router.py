"""Seam: from the router's logical expert ids to slots.

Target: `BaseRouter._apply_eplb_mapping`. Why: it is the one method that every router calls with its
logical ids, after routed experts are captured and before the kernels run. On platforms other than GPUs,
vLLM's own mapping does nothing there. Can go when vLLM has a hook for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ep_rebalance.engines.port import Session
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.parallel import part_of_batch

CONTRACTS = (
    Contract(
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._apply_eplb_mapping",
        ("topk_ids",),
    ),
    *(
        Contract(f"vllm.v1.worker.ubatching:{name}")
        for name in ("dbo_enabled", "dbo_current_ubatch_id", "_CURRENT_CONTEXTS", "_NUM_UBATCHES")
    ),
)

_ATTRIBUTE = "_ep_rebalance_route"


def install() -> None:
    """Make attached routers use our mapping; all others keep vLLM's."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    original = BaseRouter._apply_eplb_mapping

    @functools.wraps(original)
    def apply_mapping(self: Any, topk_ids: torch.Tensor) -> torch.Tensor:
        route: Callable[[torch.Tensor], torch.Tensor] | None = getattr(self, _ATTRIBUTE, None)
        return original(self, topk_ids) if route is None else route(topk_ids)

    BaseRouter._apply_eplb_mapping = apply_mapping


def attach_unbalanced(router: Any) -> None:
    """Pass ids through: the layer's experts stay where they were loaded, and are not counted."""
    setattr(router, _ATTRIBUTE, lambda topk_ids_TK: topk_ids_TK)


def attach(router: Any, session: Session, layer: int, *, tensor_rank: int) -> None:
    """Count and map one layer's ids.

    tensor_rank: under sequence parallelism, which chunk of the batch this rank's rows are; else 0.
    """

    # Chunks are equally long: vLLM pads the batch (vllm/model_executor/models/utils.py,
    # `sequence_parallel_chunk_impl`). Under dual-batch overlap what is chunked, and padded, is a part of it.
    part = part_of_batch()

    def route(topk_ids_TK: torch.Tensor) -> torch.Tensor:
        begin, end = part()
        first = begin + tensor_rank * topk_ids_TK.shape[0]
        return session.route(layer, topk_ids_TK, first, end)

    setattr(router, _ATTRIBUTE, route)
