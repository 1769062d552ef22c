"""Seam: tokens to the experts and back by our all-to-all (`data_plane.all_to_all`).

Target: `maybe_make_prepare_finalize`, wherever it is bound by name. Why: vLLM's CPU communicator lacks
`all_gatherv`, so data-parallel experts crash there; and ours gives the same bits wherever experts sit.
On GPUs the operator's choice of an all-to-all backend stays unless ours is asked for.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from numpy.typing import NDArray

from ep_rebalance.all_to_all import AllToAll, Dispatched, NodeGroups, make_all_to_all
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.data_plane import carries_tokens
from ep_rebalance.engines.vllm.engine_config import active_config
from ep_rebalance.engines.vllm.parallel import ranks_per_node
from ep_rebalance.engines.vllm.seams.cpu_experts import take_local_ids
from ep_rebalance.engines.vllm.seams.experts import GroupedExperts
from ep_rebalance.placement import first_slots_R1

_NAME = "maybe_make_prepare_finalize"
_HOME = "vllm.model_executor.layers.fused_moe.all2all_utils"

CONTRACTS = (
    Contract(f"{_HOME}:{_NAME}", ("moe", "quant_config", "use_monolithic")),
    Contract(f"vllm.model_executor.layers.fused_moe.oracle.unquantized:{_NAME}"),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEPrepareAndFinalizeModular.prepare",
        ("a1", "topk_weights", "topk_ids", "apply_router_weight_on_input"),
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEPrepareAndFinalizeModular.finalize",
        ("output", "fused_expert_output"),
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig", ("skip_final_all_reduce",)
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep:_quantize_input",
        ("a1", "quant_config"),
    ),
)


def install() -> None:
    """Use our all-to-all where the configuration asks for it."""
    original = getattr(importlib.import_module(_HOME), _NAME)

    @functools.wraps(original)
    def make(moe: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        config = active_config(get_current_vllm_config())
        if not carries_tokens(config):
            return original(moe, *args, **kwargs)
        return AllToAllPrepareAndFinalize(moe, config)

    rebind(make)


def rebind(make: Callable[..., mk.FusedMoEPrepareAndFinalize]) -> None:
    """Replace the factory by `make` in every module that imported it by name."""
    original = getattr(importlib.import_module(_HOME), _NAME)
    # Imported now, so that it is among the modules that hold the name.
    importlib.import_module("vllm.model_executor.layers.fused_moe.oracle.unquantized")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get(_NAME) is original:
            setattr(module, _NAME, make)


class AllToAllPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """Sends rows to the ranks of their slots before the expert kernel, and outputs home after it.

    Under tensor parallelism without sequence parallelism all tensor-parallel ranks hold the same
    tokens: each sends its share of them to the experts, and the results are gathered. A model that sums
    its layers' outputs over these ranks itself (Cohere2-MoE, whose attention runs beside the experts) gets
    zeros in place of the other ranks' results instead.
    """

    def __init__(self, moe: Any, config: RebalanceConfig) -> None:
        super().__init__()
        from vllm.distributed.parallel_state import get_ep_group, get_tp_group

        parallel = moe.moe_parallel_config
        tensor_group = get_tp_group()
        shared = tensor_group.world_size > 1 and not parallel.is_sequence_parallel
        self._tensor_group = tensor_group if shared else None
        self._summed_by_model: bool = shared and moe.skip_final_all_reduce
        self._ranks: int = get_ep_group().world_size
        rank: int = get_ep_group().rank_in_group
        first_R1 = first_slots_R1(moe.num_experts, self._ranks)
        slots_R = np.diff(first_R1)
        slots_per_rank = int(slots_R.max())
        self._first_slot = int(first_R1[rank])
        # A slot of the next rank, which this rank's `expert_map` has as -1: kernels skip it.
        self._elsewhere = int(first_R1[rank + 1]) % moe.num_experts
        self._levelled_P: torch.Tensor | None = None
        if slots_R.min() < slots_per_rank:
            self._levelled_P = _levelled(first_R1, slots_per_rank)
        self._all_to_all: AllToAll = make_all_to_all(
            config,
            group=get_ep_group().device_group,
            slots_per_rank=slots_per_rank,
            nodes=_node_groups() if config.data_plane.group_by_node else None,
        )
        self._dispatched: Dispatched | None = None
        self._kept: torch.Tensor | None = None
        self._pairs_stay_apart = False

    def post_init_setup(self, fused_experts: mk.FusedMoEExperts) -> None:
        """Called by vLLM with the expert kernel that it selected."""
        if isinstance(fused_experts, GroupedExperts):
            fused_experts.keep_pairs_apart()
            self._pairs_stay_apart = True
        else:
            take_local_ids(fused_experts)

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int32

    def num_dispatchers(self) -> int:
        return self._ranks

    def output_is_reduced(self) -> bool:
        # Of what is reduced vLLM sums nothing up over tensor-parallel ranks, which would be once too often.
        return not self._summed_by_model

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> mk.PrepareResultType:
        """Send this rank's tokens. Returns rows, their scales, ids and weights for the expert kernel, in
        vLLM's form.

        Rows are sent as they are, and quantised where they arrive: a row's scales come from it alone, or from
        the layer.
        """
        hidden, weights, slots = (self._share(t) for t in (a1, topk_weights, topk_ids))
        if self._levelled_P is not None:
            slots = self._level(self._levelled_P, slots)
        if apply_router_weight_on_input:
            hidden, weights = hidden * weights.to(hidden.dtype), torch.ones_like(weights)
        self._dispatched = self._all_to_all.dispatch(hidden, slots, weights)
        rows, ids = self._as_the_experts_take_them(self._dispatched)
        # The router's weights are applied when outputs are combined, not by the experts.
        ones = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
        if defer_input_quant or quant_config is None or quant_config.quant_dtype is None:
            return rows, None, None, ids, ones
        rows, scales = _quantise(rows, quant_config)
        return rows, scales, None, ids, ones

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: mk.TopKWeightAndReduce,
    ) -> None:
        """Bring the experts' outputs home and write each token's sum to `output`."""
        assert self._dispatched is not None
        dispatched, self._dispatched = self._dispatched, None
        outputs = self._one_row_per_pair(dispatched, fused_expert_output)
        if self._tensor_group is None:
            self._all_to_all.combine(dispatched, outputs, output)
            return
        if self._summed_by_model:
            self._all_to_all.combine(dispatched, outputs, self._share(output.zero_()))
            return
        # The gather takes equally many rows from each rank, so the last shares are padded.
        share = output.new_zeros(self._share_size(len(output)), output.shape[1])
        own = share[: len(dispatched.weights_TK)]
        self._all_to_all.combine(dispatched, outputs, own)
        output.copy_(self._tensor_group.all_gather(share, 0)[: len(output)])

    def _level(self, levelled_P: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        # At the first call, and not while the model is loaded: a sleeping engine gives such memory back.
        self._levelled_P = levelled_P = levelled_P.to(slots_TK.device)
        return torch.where(slots_TK < 0, slots_TK, levelled_P[slots_TK.clamp(min=0)])

    def _as_the_experts_take_them(
        self, dispatched: Dispatched
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, ids) for the kernel that was selected.

        vLLM's kernels sum over a row's ids, so each pair becomes a row of its own. On CPU they take slots
        of this rank, and no void ones; on GPUs slots over all ranks, of which they compute their own.
        """
        local_N, pairs = dispatched.local_slots_N, dispatched.pairs_per_row
        if self._pairs_stay_apart:
            return dispatched.rows_MH, local_N.view(-1, pairs)
        if local_N.is_cuda:
            ids = torch.where(local_N < 0, self._elsewhere, local_N + self._first_slot)
            return dispatched.rows_MH.repeat_interleave(pairs, 0), ids.unsqueeze(1)
        if not dispatched.may_be_void:
            return dispatched.rows_MH, local_N.unsqueeze(1)
        self._kept = (local_N >= 0).nonzero().squeeze(1)
        return dispatched.rows_MH[self._kept // pairs], local_N[self._kept].unsqueeze(1)

    def _one_row_per_pair(self, dispatched: Dispatched, outputs: torch.Tensor) -> torch.Tensor:
        kept, self._kept = self._kept, None
        if kept is None:
            return outputs.reshape(-1, outputs.shape[-1])
        apart = outputs.new_empty(len(dispatched.local_slots_N), outputs.shape[1])
        apart[kept] = outputs
        return apart

    def _share_size(self, num_tokens: int) -> int:
        assert self._tensor_group is not None
        ranks: int = self._tensor_group.world_size
        return -(-num_tokens // ranks)

    def _share(self, rows: torch.Tensor) -> torch.Tensor:
        if self._tensor_group is None:
            return rows
        size = self._share_size(len(rows))
        start = self._tensor_group.rank_in_group * size
        return rows[start : start + size]


def _levelled(first_R1: NDArray[np.int64], slots_per_rank: int) -> torch.Tensor:
    """int32 [P], what number each slot would have if all ranks had as many as the fullest: our all-to-all
    takes slot `p` to rank `p // S`.
    """
    gap_R = slots_per_rank * np.arange(len(first_R1) - 1) - first_R1[:-1]
    levelled_P = np.arange(first_R1[-1]) + np.repeat(gap_R, np.diff(first_R1))
    return torch.from_numpy(levelled_P.astype(np.int32))


@functools.cache
def _node_groups() -> NodeGroups:
    """Made for the first MoE layer and shared by all."""
    from vllm.distributed.parallel_state import get_ep_group

    return NodeGroups.create(get_ep_group().device_group, ranks_per_node())


def _quantise(rows_MH: torch.Tensor, quant_config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As vLLM prepares the rows of one rank (vllm/model_executor/layers/fused_moe/prepare_finalize/
    no_dp_ep.py). No rows have no scales: its CUDA kernels fail without a row, as deepep_ht.py there knows.
    """
    if not len(rows_MH):
        return rows_MH, None
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import _quantize_input

    quantised: tuple[torch.Tensor, torch.Tensor | None] = _quantize_input(rows_MH, quant_config)
    return quantised
