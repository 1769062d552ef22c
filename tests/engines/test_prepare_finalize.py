"""Ranks that hold the same tokens share them out, and each of them gets every result."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from padded_steps import TOP_K, is_padding, with_padding
from ranks import Ranks
from routed_steps import EXPERTS, compute_expert, make_step, reference
from vllm_groups import IMPORT_SECONDS, join

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.placement import first_slots_R1


def expert_map(experts: int, rank: int) -> torch.Tensor:
    """vLLM's own: the local slot of each expert, -1 where it is on another rank."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    _, found, _ = determine_expert_map(dist.get_world_size(), rank, experts)
    return found


def forward(
    rank: int,
    tokens: int,
    padded: str | None,
    plane: dict,
    summed: bool = False,
    experts: int = EXPERTS,
) -> tuple:
    """(output, reference) of a step whose tokens all ranks hold.

    summed: whether the model sums outputs over ranks itself.
    """
    from ep_rebalance.engines.vllm.seams.prepare_finalize import AllToAllPrepareAndFinalize

    join(rank)
    maps = [expert_map(experts, r) for r in range(dist.get_world_size())]
    placement = [(found >= 0).nonzero().flatten().tolist() for found in maps]
    step = make_step(0, tokens, TOP_K, torch.float32, placement, experts, seed=tokens)
    if padded is not None:
        step = with_padding(step, is_padding(padded, 0, tokens))
    moe = SimpleNamespace(
        num_experts=experts,
        moe_parallel_config=SimpleNamespace(is_sequence_parallel=False),
        skip_final_all_reduce=summed,
    )
    layer = AllToAllPrepareAndFinalize(moe, RebalanceConfig.model_validate({"data_plane": plane}))
    rows, _, _, ids, _ = layer.prepare(
        step.hidden_TH, step.weights_TK, step.slots_TK, experts, None, False, None
    )
    outputs = torch.empty_like(rows)
    for n, (slot,) in enumerate(ids.tolist()):
        outputs[n] = compute_expert(placement[rank][slot], rows[n])
    out_TH = torch.full_like(step.hidden_TH, torch.nan)
    layer.finalize(out_TH, outputs, step.weights_TK, step.slots_TK, False, None)
    assert layer.output_is_reduced() is not summed
    # What kernels on GPUs are told: a local slot by its number over all ranks, and one that is not here.
    own = torch.arange(len(placement[rank]))
    assert torch.equal(maps[rank][own + layer._first_slot], own.int())
    assert maps[rank][layer._elsewhere] == -1
    return out_TH, reference(step)


@pytest.mark.parametrize(
    "plane", [{"buffers": "exact"}, {"buffers": "fixed", "capacity_factor": 0.3}]
)
@pytest.mark.parametrize("padded", [None, "last rows", "single pairs", "all ranks idle"])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_every_rank_gets_every_result(two_ranks: Ranks, tokens, padded, plane):
    for out_TH, expected in two_ranks.run(forward, tokens, padded, plane, timeout=IMPORT_SECONDS):
        assert torch.equal(out_TH, expected)


@pytest.mark.parametrize("padded", [None, "all ranks idle"])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_model_that_sums_over_ranks_gets_every_result_once(two_ranks: Ranks, tokens, padded):
    plane = {"buffers": "exact"}
    told = two_ranks.run(forward, tokens, padded, plane, True, timeout=IMPORT_SECONDS)
    (first_TH, expected), (second_TH, _) = told
    assert torch.equal(first_TH + second_TH, expected)
    assert not (first_TH * second_TH).any()


@pytest.mark.parametrize(
    "plane", [{"buffers": "exact"}, {"buffers": "fixed", "capacity_factor": 0.3}]
)
@pytest.mark.parametrize("experts", [9, 5, 3])
def test_tokens_find_experts_that_do_not_divide_by_the_ranks(four_ranks: Ranks, experts, plane):
    """As nine do on ranks that have 3, 2, 2 and 2 of them. With three, one of the ranks has none."""
    given = (8, "single pairs", plane, False, experts)
    for out_TH, expected in four_ranks.run(forward, *given, timeout=IMPORT_SECONDS):
        assert torch.equal(out_TH, expected)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_slots_are_numbered_as_if_all_ranks_had_as_many_as_the_fullest(vllm, ranks):
    from ep_rebalance.engines.vllm.seams.prepare_finalize import _levelled

    for experts in range(1, 5 * ranks):
        first_R1 = first_slots_R1(experts, ranks)
        counts_R = np.diff(first_R1)
        rank_P = np.repeat(np.arange(ranks), counts_R)
        numbers_P = _levelled(first_R1, counts_R.max()).numpy()
        assert (numbers_P // counts_R.max() == rank_P).all()
        assert (numbers_P % counts_R.max() == np.arange(experts) - first_R1[rank_P]).all()


def to_fp8(rows: torch.Tensor, *given, **options) -> tuple:
    """A CPU has no such kernel, and on a GPU it fails for no rows."""
    import reference_experts

    assert len(rows)
    return reference_experts._to_fp8(rows, *given, **options)


def prepare_for_8_bit_kernels(rank: int, tokens: int, first_rank_only: bool = False) -> tuple:
    """(rows as sent, rows as a kernel for FP8 takes them, what a kernel that quantises by itself takes)."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    from ep_rebalance.engines.vllm.seams.prepare_finalize import AllToAllPrepareAndFinalize

    join(rank)
    _custom_ops.scaled_fp8_quant = to_fp8
    placement = [list(range(r * EXPERTS // 2, (r + 1) * EXPERTS // 2)) for r in range(2)]
    step = make_step(0, tokens, TOP_K, torch.float32, placement, EXPERTS, seed=6)
    if first_rank_only:
        step.slots_TK.remainder_(EXPERTS // 2)
    moe = SimpleNamespace(
        num_experts=EXPERTS,
        moe_parallel_config=SimpleNamespace(is_sequence_parallel=False),
        skip_final_all_reduce=False,
    )
    scale = torch.tensor([0.02])
    quantised = fp8_w8a8_moe_quant_config(
        w1_scale=scale, w2_scale=scale, a1_scale=scale, a2_scale=scale
    )
    layer = AllToAllPrepareAndFinalize(moe, RebalanceConfig())
    given = (step.hidden_TH, step.weights_TK, step.slots_TK, EXPERTS, None, False)
    plain, *_ = layer.prepare(*given, None)
    rows, scales, *_ = layer.prepare(*given, quantised)
    deferred, none, *_ = layer.prepare(*given, quantised, defer_input_quant=True)
    assert none is None
    if scales is None:
        return plain, rows, deferred, rows.dtype
    return plain, rows.float() * scales, deferred, rows.dtype


def test_a_kernel_that_takes_8_bit_rows_gets_them_with_their_scales(two_ranks: Ranks):
    for plain, dequantised, deferred, dtype in two_ranks.run(
        prepare_for_8_bit_kernels, 6, timeout=IMPORT_SECONDS
    ):
        assert dtype == torch.float8_e4m3fn
        assert torch.equal(deferred, plain)
        torch.testing.assert_close(dequantised, plain, rtol=0.07, atol=0.02)


def test_a_rank_that_gets_no_row_quantises_none(two_ranks: Ranks):
    """As in vLLM's first step, whose tokens are all alike."""
    first, second = two_ranks.run(prepare_for_8_bit_kernels, 6, True, timeout=IMPORT_SECONDS)
    assert len(first[1]) == len(first[0]) > 0
    assert len(second[1]) == len(second[0]) == 0
