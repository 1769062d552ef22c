"""The trials of moves (`migration/proof.py`, `migration/trial_move.py`) on a MoE layer of vLLM, through
its real kernel.

No exception leaves them on one rank alone: it becomes a verdict, and `migration/verdicts.py` tells it to
all. A layer's kernel may be collective, where all-to-alls are part of it: a rank where it raised then keeps
the others waiting in it, until `distributed_timeout_seconds` of vLLM's ParallelConfig or what torch has
for the backend, and they fail, too.
"""

from __future__ import annotations

from typing import Any

import torch

from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.expert_tensors import LayerTensors
from ep_rebalance.engines.vllm.parallel import ep_group
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import Proof, failed, prove_moves, ring_ids
from ep_rebalance.migration.trial_move import RingProof, prove_move

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_METHOD = f"{_FUSED_MOE}.fused_moe_method_base:FusedMoEMethodBase"
_APPLIED = ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input")

CONTRACTS = (
    Contract(f"{_METHOD}.apply", _APPLIED),
    Contract(f"{_METHOD}.topk_indices_dtype"),
    Contract(f"{_FUSED_MOE}.routed_experts:RoutedExperts._ensure_moe_quant_config_init"),
    Contract(f"{_FUSED_MOE}.runner.moe_runner:MoERunner._sequence_parallel_context"),
    Contract("vllm.forward_context:set_forward_context", ("vllm_config", "num_tokens")),
)

_SEED = 0


def compute_once(layer: Any, vllm_config: Any) -> Proof | None:
    """Let the kernel make what it makes at its first call, before its tensors are looked for. Only that it
    failed is a finding.

    Collective where the layer is.
    layer: of vLLM's `moe_layers`.
    """
    try:
        _Trial(layer, vllm_config).compute(_ring(layer))
    except Exception as error:
        return failed(error)
    return None


def prove_layer(layer: Any, tensors: LayerTensors, vllm_config: Any) -> Proof:
    """Whether what was found is what has to move.

    Collective where the layer is: all ranks call it for the same layers in the same order, outside of a
    forward pass and of a capture.
    layer: of vLLM's `moe_layers`. tensors: of it.
    """
    try:
        trial, ids_TK = _Trial(layer, vllm_config), _ring(layer)
    except Exception as error:
        return failed(error)
    return prove_moves(trial.compute, tensors.slabs, ids_TK)


def prove_layer_between_ranks(
    layer: Any, number: int, memory: ExpertMemory, vllm_config: Any
) -> RingProof:
    """Whether the layer's experts are the same on the next EP rank. Collective, as `prove_layer`.

    layer: of vLLM's `moe_layers`. number: of it in `memory`.
    """
    trials: list[_Trial] = []

    def compute(ids_TK: torch.Tensor) -> torch.Tensor:
        if not trials:  # made here, where it may fail and the others are told
            trials.append(_Trial(layer, vllm_config))
        return trials[0].compute(ids_TK)

    ranks = ep_group()
    return prove_move(
        memory,
        number,
        compute,
        _ring(layer),
        group=ranks.device_group,
        host_group=ranks.cpu_group,
    )


def _ring(layer: Any) -> torch.Tensor:
    experts = layer.routed_experts
    ids_TK = ring_ids(int(experts.local_num_experts), int(experts.top_k))
    return ids_TK.to(experts.moe_config.device)


class _Trial:
    """Tokens of this rank for its own experts, always the same.

    They go past the router, by `FusedMoEMethodBase.apply` (vllm/model_executor/layers/fused_moe/
    fused_moe_method_base.py), as `RoutedExperts.forward_modular` calls it. Tensor-parallel ranks that
    share their tokens have those of all of them, and each looks at its own.

    A token's first expert has all the weight. Kernels that sum in the order of slots or of arrival (the
    epilogue of FlashInfer's CUTLASS kernel adds atomically) then have nothing to sum in another order.
    """

    def __init__(self, layer: Any, vllm_config: Any) -> None:
        self._layer = layer
        self._experts = layer.routed_experts
        self._experts._ensure_moe_quant_config_init()  # as `MoERunner` does it before each call
        self._vllm_config = vllm_config
        self._config = config = self._experts.moe_config
        self._top_k = int(self._experts.top_k)
        self._local = tokens = int(self._experts.local_num_experts)
        ranks, place = _ranks_of_shared_tokens(config)
        first_rank = config.moe_parallel_config.ep_rank - place
        self._own = slice(place * tokens, (place + 1) * tokens)
        self._first_slot_R11 = tokens * torch.arange(
            first_rank, first_rank + ranks, dtype=torch.int32, device=config.device
        ).view(-1, 1, 1)
        self._hidden_TH = _hidden_TH(self._experts, tokens).to(config.device).repeat(ranks, 1)
        self._ids_dtype = self._experts.quant_method.topk_indices_dtype or torch.int32
        self._repeats = _takes_one_scale(self._experts)

    @torch.inference_mode()
    def compute(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Outputs [T, H] of the tokens by their first experts, which are local ones."""
        slots_TK = self._slots_RTK(ids_TK).flatten(0, 1).to(self._ids_dtype)
        weights_TK = torch.zeros(slots_TK.shape, device=slots_TK.device)
        weights_TK[:, 0] = 1.0
        # What buffers of an all-to-all have room for, of a rank for an expert.
        most = self._config.max_num_tokens
        if self._repeats:
            most = max(1, most // slots_TK.shape[1])
        together = (self._hidden_TH, weights_TK, slots_TK)
        parts = zip(*(each.split(most) for each in together), strict=True)
        output_TH = torch.cat([self._apply(*part) for part in parts])
        return output_TH[self._own, : self._config.hidden_dim_unpadded].clone()

    def _slots_RTK(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """The first expert of a token and those behind it, as many as kernels are made for and no two the
        same: buffers of DeepEP overflow else, and some kernels take a token once for each expert. Where a
        rank has too few of its own, others' follow.

        A kernel that takes one scale from all tokens wants nothing but what it was asked for, since that of
        other experts enters the scale.
        """
        if self._repeats:
            return ids_TK + self._first_slot_R11
        place_K = torch.arange(self._top_k, dtype=torch.int32, device=ids_TK.device)
        local_TK = (ids_TK[:, :1] + place_K) % self._local
        followers_TK = torch.where(place_K < self._local, local_TK, place_K)
        return (followers_TK + self._first_slot_R11) % self._config.num_experts

    def _apply(
        self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, slots_TK: torch.Tensor
    ) -> torch.Tensor:
        from vllm.forward_context import set_forward_context

        # Sequence-parallel ranks divide what vLLM counts here among them.
        counted = len(slots_TK) * self._config.moe_parallel_config.sp_size
        with (
            set_forward_context(None, self._vllm_config, num_tokens=counted),
            # Tells vLLM's own exchange over data-parallel ranks how many tokens each has, as in
            # `MoERunner` (vllm/model_executor/layers/fused_moe/runner/moe_runner.py).
            self._layer._sequence_parallel_context(),
        ):
            output: torch.Tensor = self._experts.quant_method.apply(
                layer=self._experts,
                x=hidden_TH.clone(),  # some kernels write over it
                topk_weights=weights_TK,
                topk_ids=slots_TK,
                shared_experts=None,
                shared_experts_input=None,
            )
        return output.clone()


def _hidden_TH(experts: Any, tokens: int) -> torch.Tensor:
    """As wide as the kernel wants them, nothing where vLLM pads: weights may be anything there."""
    config = experts.moe_config
    generator = torch.Generator().manual_seed(_SEED)
    hidden_TH = torch.randn(tokens, config.hidden_dim_unpadded, generator=generator)
    if not experts.quant_method.skip_forward_padding:
        padding = config.hidden_dim - config.hidden_dim_unpadded
        hidden_TH = torch.nn.functional.pad(hidden_TH, (0, padding))
    return hidden_TH.to(config.in_dtype)


def _takes_one_scale(experts: Any) -> bool:
    """Whether the kernel scales the activations of all tokens that a rank has by their largest
    (`FusedMoEQuantConfig` in vllm/model_executor/layers/fused_moe/config.py).
    """
    scheme = experts.quant_method.moe_quant_config
    if scheme is None or not isinstance(scheme.quant_dtype, torch.dtype):  # as "nvfp4"
        return False
    divided = scheme.is_per_act_token or scheme.is_block_quantized
    return not divided and scheme.a1_scale is None


def _ranks_of_shared_tokens(config: Any) -> tuple[int, int]:
    """How many ranks have the same tokens, and which of them this one is.

    config: vLLM's FusedMoEConfig.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if config.is_sequence_parallel:
        return 1, 0
    return int(group.world_size), int(group.rank_in_group)
