"""A vLLM plugin that takes tokens to experts on CPU as vLLM does on GPUs: what its CPU classes lack.

- Batches are padded, as to the sizes of CUDA graphs, and routers give padded rows the id -1, as those
  of GPUs do (vllm/model_executor/layers/fused_moe/router/fused_topk_router.py): rows beyond a busy
  rank's tokens, and all rows of an idle data-parallel rank.
- The communicator has `all_gatherv` and `reduce_scatterv`, which the all-to-all
  `allgather_reducescatter` calls.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm_eplb_on_cpu import after_kernel_scan

UNEVEN_PARTS_ONLY = "GPU_TOKEN_PATHS_UNEVEN_PARTS_ONLY"
"""An environment variable: no padding, whose ids vLLM's own experts for CPUs cannot bear."""
PADDED_TO = 8
"""Rows of a batch: a multiple of this."""


def register() -> None:
    """Entry point of `vllm.general_plugins`. The front end, too, looks what the communicator has."""
    _exchange_uneven_parts()
    if os.environ.get(UNEVEN_PARTS_ONLY) is None:
        after_kernel_scan(_install)


def _install() -> None:
    _pad_batches()
    _mark_padded_rows()


def _pad_batches() -> None:
    """In both runners, where they would choose a CUDA graph."""
    import vllm.v1.worker.gpu.model_runner as v2
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    def padded(num_tokens: int) -> int:
        return -(-num_tokens // PADDED_TO) * PADDED_TO

    in_v1, in_v2 = CudagraphDispatcher.dispatch, v2.dispatch_cg_and_sync_dp

    @functools.wraps(in_v1)
    def dispatch(self: Any, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        return in_v1(self, padded(num_tokens), *args, **kwargs)

    @functools.wraps(in_v2)
    def dispatch_and_sync(
        manager: Any, reqs: int, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        return in_v2(manager, reqs, padded(num_tokens), *args, **kwargs)

    CudagraphDispatcher.dispatch = dispatch
    v2.dispatch_cg_and_sync_dp = dispatch_and_sync


def _mark_padded_rows() -> None:
    from vllm.forward_context import get_forward_context, is_forward_context_available
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    compute = CPURouter._compute_routing

    @functools.wraps(compute)
    def compute_routing(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights_TK, ids_TK = compute(self, *args, **kwargs)
        if is_forward_context_available():
            padding_T = get_forward_context().is_padding
            if padding_T is not None:
                ids_TK = ids_TK.masked_fill(padding_T[: len(ids_TK)].unsqueeze(1), -1)
        return weights_TK, ids_TK

    CPURouter._compute_routing = compute_routing


def _exchange_uneven_parts() -> None:
    """gloo's `all_to_all_single` takes parts of any size; sums are taken in the order of ranks."""
    import torch.distributed as dist
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(self: Any, given: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        if isinstance(given, list):
            return [all_gatherv(self, tensor, dim, sizes) for tensor in given]
        own = [len(given)] * self.world_size
        gathered = given.new_empty(sum(sizes or own), *given.shape[1:])
        for_all = given.repeat(self.world_size, *[1] * (given.dim() - 1))
        dist.all_to_all_single(gathered, for_all, sizes or own, own, group=self.device_group)
        return gathered

    def reduce_scatterv(
        self: Any, given: Any, dim: int = -1, sizes: list[int] | None = None
    ) -> Any:
        parts = sizes or [len(given) // self.world_size] * self.world_size
        own = parts[self.rank_in_group]
        received = given.new_empty(self.world_size, own, *given.shape[1:])
        dist.all_to_all_single(
            received.flatten(0, 1),
            given.contiguous(),
            [own] * self.world_size,
            parts,
            group=self.device_group,
        )
        return received.sum(0)

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
