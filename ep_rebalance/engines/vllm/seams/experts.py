"""Seam: the experts by our grouped MLP (`data_plane.experts: triton`).

Target: `backend_to_kernel_cls`, which lists the classes that vLLM tries in turn when it selects a kernel.
Why: it is how vLLM itself adds kernels, and its modular interface does the rest. Can go when vLLM lets a
plugin register one.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.engine_config import active_config
from ep_rebalance.kernels.activation import Activation, ActivationName
from ep_rebalance.kernels.group_tokens import group_tokens
from ep_rebalance.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from ep_rebalance.kernels.tiles import mlp_tiles
from ep_rebalance.kernels.weighted_sum import weighted_sum

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.unquantized"
_NAME = "backend_to_kernel_cls"
_REPLACED = ("TRITON", "CPU")
"""Backends that leave the weights as in the checkpoint unless a kernel class changes them."""

CONTRACTS = (
    Contract(f"{_ORACLE}:{_NAME}", ("backend",)),
    *(Contract(f"{_ORACLE}:UnquantizedMoeBackend.{name}") for name in _REPLACED),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExpertsModular.apply",
        (
            "output",
            "w1",
            "w2",
            "topk_weights",
            "topk_ids",
            "activation",
            "expert_map",
            "workspace2",
        ),
    ),
    Contract("vllm.model_executor.layers.fused_moe.config:FusedMoEConfig", ("swiglu_limit",)),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExpertsModular.workspace_shapes",
        ("M", "N", "K", "topk"),
    ),
)

_ACTIVATIONS: dict[str, tuple[ActivationName, bool]] = {
    "silu": ("silu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "swigluoai": ("swiglu_oai", True),
    "swigluoai_uninterleave": ("swiglu_oai", False),
}
"""For each of vLLM's names: our name, and whether gate and up columns alternate in the weights."""


_SWIGLU_OAI = (1.702, 1.0, 7.0)
"""Its alpha, beta (added to the up projection) and limit in gpt-oss."""


def install() -> None:
    """Make vLLM try our class first where the configuration asks for it."""
    oracle = importlib.import_module(_ORACLE)
    original = getattr(oracle, _NAME)

    @functools.wraps(original)
    def backend_to_kernel_cls(backend: Any) -> list[type[mk.FusedMoEExperts]]:
        from vllm.config import get_current_vllm_config

        classes: list[type[mk.FusedMoEExperts]] = original(backend)
        config = active_config(get_current_vllm_config())
        if config.data_plane.experts == "triton" and backend.name in _REPLACED:
            return [GroupedExperts, *classes]
        return classes

    setattr(oracle, _NAME, backend_to_kernel_cls)


def local_slots(slots_MK: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """[M, K], slots within this rank; -1 for those of other ranks and for padding.

    slots_MK: [M, K]. Slots over all ranks, below 0 for padding.
    expert_map: [P]. vLLM's map from slots over all ranks to local ones, -1 for those of other ranks.
    """
    return expert_map[slots_MK].masked_fill(slots_MK < 0, -1)  # indexing by -1 reads the last slot


class GroupedExperts(mk.FusedMoEExpertsModular):
    """Groups the (row, slot) pairs by slot and computes them with the grouped MLP.

    With vLLM's own all-to-all, a row's pairs are weighted and summed here, as in vLLM's kernels. With
    ours, ids are slots of this rank or -1, and each pair's output is returned unweighted.
    """

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        self._pairs_stay_apart = False

    def keep_pairs_apart(self) -> None:
        """Called once by our all-to-all."""
        self._pairs_stay_apart = True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        from vllm.platforms import current_platform

        return bool(current_platform.is_cuda_alike() or current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in _ACTIVATIONS

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts], moe_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[bool, str | None]:
        """(whether it can be used, why not). vLLM passes the class itself, as `cls`."""
        if moe_config.activation.value == "silu" and moe_config.swiglu_limit is not None:
            return False, "kernel does not clamp SiLU"
        if moe_config.activation.value == "swigluoai_uninterleave":
            given = (moe_config.swiglu_alpha, moe_config.swiglu_beta, moe_config.swiglu_limit)
            if given != _SWIGLU_OAI:
                return False, f"kernel computes SwiGLU-OAI of {_SWIGLU_OAI} only, not of {given}"
        supported: tuple[bool, str | None] = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, *args, **kwargs
        )
        return supported

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of vLLM's two workspaces and of the output, for M rows with K columns.

        The second workspace holds the pairs' outputs before they are summed; the first is not used.
        """
        if self._pairs_stay_apart:
            return (0,), (0,), (M, topk, K)
        return (0,), (M, topk, K), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Compute `output`: a row for each row, or for each of its pairs if these are kept apart."""
        weights = ExpertWeights(
            gate_up=w1, down=w2, gate_up_bias=self.w1_bias, down_bias=self.w2_bias
        )
        if self._pairs_stay_apart:
            self._compute(hidden_states, topk_ids, weights, activation, output)
            return
        slots_MK = topk_ids if expert_map is None else local_slots(topk_ids, expert_map)
        self._compute(hidden_states, slots_MK, weights, activation, workspace2)
        pair_MK = torch.arange(slots_MK.numel(), device=output.device).view(slots_MK.shape)
        position_MK = pair_MK.masked_fill(slots_MK < 0, -1)
        factors = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        output.copy_(weighted_sum(workspace2.view(-1, output.shape[1]), position_MK, factors))

    def _compute(
        self,
        rows_MH: torch.Tensor,
        slots_MK: torch.Tensor,
        weights: ExpertWeights,
        activation: Any,
        out_MKH: torch.Tensor,
    ) -> None:
        num_slots, hidden, intermediate = weights.down.shape
        tiles = mlp_tiles(
            num_pairs=slots_MK.numel(),
            num_slots=num_slots,
            hidden=hidden,
            intermediate=intermediate,
            fp8=False,
            device=rows_MH.device,
        )
        groups = group_tokens(slots_MK, num_slots=num_slots, block_rows=tiles.rows)
        grouped_mlp(
            rows_MH,
            groups,
            weights,
            self._activation(activation),
            out_MKH.view(-1, hidden),
            tiles=tiles,
            pairs_per_row=slots_MK.shape[1],
        )

    def _activation(self, activation: Any) -> Activation:
        # vLLM's `swigluoai` kernel takes no parameters; `is_supported_config` holds the other one to the
        # same (vllm/model_executor/layers/fused_moe/activation.py).
        name, interleaved = _ACTIVATIONS[activation.value]
        return Activation(name=name, interleaved=interleaved)
