"""Experts under the engine's all-to-all: each rank computes the pairs of its own slots, and no padding."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from ep_rebalance.engines.vllm.seams import cpu_experts

SLOTS, HIDDEN, INTERMEDIATE = 6, 64, 32
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
CLASSES = ["CPUUnquantizedExperts", "GroupedExperts"]


@pytest.fixture(params=CLASSES)
def experts(vllm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As a server with the plugin makes them."""
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from ep_rebalance.engines.vllm.seams.experts import GroupedExperts

    # Undoes what `install` does, and what another test's import of the worker extension did.
    monkeypatch.setattr(CPUUnquantizedExperts, "apply", inspect.unwrap(CPUUnquantizedExperts.apply))
    cpu_experts.install()
    chosen = {"CPUUnquantizedExperts": CPUUnquantizedExperts, "GroupedExperts": GroupedExperts}
    return chosen[request.param](moe_config(), FUSED_MOE_UNQUANTIZED_CONFIG)


def moe_config() -> Any:
    """Of vLLM, for one rank."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    return FusedMoEConfig(
        num_experts=SLOTS,
        experts_per_token=2,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=SLOTS,
        num_logical_experts=SLOTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.float32,
    )


@dataclass(frozen=True)
class Batch:
    """What a layer's experts get, and its weights."""

    hidden_MH: torch.Tensor
    ids_MK: torch.Tensor
    weights_MK: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def make_batch(top_k: int, dtype: torch.dtype, *, tokens: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(top_k)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    ids = [torch.randperm(SLOTS, generator=generator)[:top_k] for _ in range(tokens)]
    return Batch(
        hidden_MH=HIDDEN**0.5 * draw(tokens, HIDDEN),
        ids_MK=torch.stack(ids).int(),
        weights_MK=torch.rand(tokens, top_k, generator=generator),
        gate_up=draw(SLOTS, 2 * INTERMEDIATE, HIDDEN),
        down=draw(SLOTS, HIDDEN, INTERMEDIATE),
    )


def with_padding(batch: Batch, padding_MK: torch.Tensor) -> Batch:
    """Padding holds NaN wherever it can."""
    padding_M1 = padding_MK.all(1, keepdim=True)
    return replace(
        batch,
        hidden_MH=batch.hidden_MH.masked_fill(padding_M1, torch.nan),
        ids_MK=batch.ids_MK.masked_fill(padding_MK, -1),
        weights_MK=batch.weights_MK.masked_fill(padding_MK, torch.nan),
    )


def compute(
    experts: Any, batch: Batch, slots: range, *, mapped: bool = True, on_input: bool = False
) -> torch.Tensor:
    """One rank's result. Its memory held NaN before. mapped: whether vLLM hands over its map."""
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    own = slice(slots.start, slots.stop)
    gate_up, down = batch.gate_up[own], batch.down[own]
    if isa := getattr(experts, "isa", None):
        gate_up, down = (cpu_prepack_moe_weight(weight, isa) for weight in (gate_up, down))
    expert_map = torch.full((SLOTS,), -1, dtype=torch.int32)
    expert_map[own] = torch.arange(len(slots), dtype=torch.int32)
    (rows, top_k), dtype = batch.ids_MK.shape, batch.hidden_MH.dtype
    shapes = experts.workspace_shapes(
        rows, 2 * INTERMEDIATE, HIDDEN, top_k, SLOTS, len(slots), None, MoEActivation.SILU
    )
    first, second, output = (torch.full(shape, torch.nan, dtype=dtype) for shape in shapes)
    experts.apply(
        output=output,
        hidden_states=batch.hidden_MH,
        w1=gate_up,
        w2=down,
        topk_weights=batch.weights_MK,
        topk_ids=batch.ids_MK,
        activation=MoEActivation.SILU,
        global_num_experts=SLOTS,
        expert_map=expert_map if mapped else None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=first,
        workspace2=second,
        expert_tokens_meta=None,
        apply_router_weight_on_input=on_input,
    )
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "on_input"), [(1, False), (1, True), (3, False)])
def test_what_two_ranks_compute_adds_up_to_what_one_computes(experts, dtype, top_k, on_input):
    batch = make_batch(top_k, dtype)
    whole = compute(experts, batch, range(SLOTS), mapped=False, on_input=on_input)
    halves = [compute(experts, batch, half, on_input=on_input) for half in (range(2), range(2, 6))]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(sum(half.float() for half in halves), whole.float(), **close)


@pytest.mark.parametrize(("top_k", "on_input"), [(1, False), (1, True), (3, False)])
def test_padding_is_zeros_and_changes_no_other_row(experts, top_k, on_input):
    batch = make_batch(top_k, torch.float32)
    padding_MK = torch.zeros_like(batch.ids_MK, dtype=torch.bool)
    padding_MK[1, -1] = True
    padding_MK[[4, 10, 11]] = True
    padded = with_padding(batch, padding_MK)
    without = replace(batch, weights_MK=batch.weights_MK.masked_fill(padding_MK, 0.0))
    for half in (range(3), range(3, 6)):
        expected = compute(experts, without, half, on_input=on_input)
        expected[padding_MK.all(1)] = 0.0
        result = compute(experts, padded, half, on_input=on_input)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_a_rank_without_any_pair_gives_zeros(experts):
    batch = make_batch(2, torch.float32)
    nothing = with_padding(batch, torch.ones_like(batch.ids_MK, dtype=torch.bool))
    elsewhere = replace(batch, ids_MK=batch.ids_MK % 3)
    for given in (nothing, elsewhere):
        assert not compute(experts, given, range(3, 6)).any()


@pytest.mark.parametrize("experts", ["CPUUnquantizedExperts"], indirect=True)
def test_ids_of_our_all_to_all_are_taken_as_they_are(experts):
    batch = make_batch(2, torch.float32)
    local = replace(batch, ids_MK=batch.ids_MK % 3)
    expected = compute(experts, local, range(3, 6), mapped=False)
    cpu_experts.take_local_ids(experts)
    assert torch.equal(compute(experts, local, range(3, 6)), expected)


@pytest.mark.parametrize(
    ("alpha", "beta", "limit", "supported"),
    [
        (1.702, 1.0, 7.0, True),
        (None, None, 7.0, False),
        (1.702, 0.0, 7.0, False),
        (1.702, 1.0, 5.0, False),
    ],
)
def test_vllms_swiglu_with_parameters_is_taken_only_where_it_is_that_of_gpt_oss(
    vllm, alpha, beta, limit, supported
):
    """Ours has no parameters: with others it would compute something else."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from ep_rebalance.engines.vllm.seams.experts import GroupedExperts

    config = replace(
        moe_config(),
        activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE,
        swiglu_alpha=alpha,
        swiglu_beta=beta,
        swiglu_limit=limit,
    )
    answer, reason = GroupedExperts.is_supported_config(
        GroupedExperts, config, None, None, GroupedExperts.activation_format()
    )
    assert answer is supported
    assert supported or "SwiGLU-OAI" in reason
