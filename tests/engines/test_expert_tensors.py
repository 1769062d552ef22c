"""What vLLM's layers keep of an expert is found, on checkpoints that vLLM itself has loaded."""

import copy
import dataclasses
import functools
import itertools
import json
import weakref
from types import SimpleNamespace

import loaded_models
import pytest
import quantised_checkpoints
import reference_experts
import torch
from loaded_models import LoadedModel

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.vllm import expert_proof, expert_tensors
from ep_rebalance.engines.vllm.expert_proof import compute_once, prove_layer
from ep_rebalance.engines.vllm.expert_tensors import (
    find_expert_tensors,
    refusal_of_change,
    refuse_differences,
    refuse_unmovable,
)
from ep_rebalance.migration.proof import Verdict

EXPERTS, HIDDEN, INTERMEDIATE = 16, 128, 128
GATE_UP, DOWN = 2 * INTERMEDIATE, HIDDEN

FP8 = {"w13_weight": GATE_UP * HIDDEN, "w2_weight": DOWN * INTERMEDIATE}
ROWS = {"w13_weight_scale": 4 * GATE_UP, "w2_weight_scale": 4 * DOWN}
WNA16 = {
    "w13_weight_packed": GATE_UP * HIDDEN // 2,
    "w13_weight_scale": 2 * GATE_UP * HIDDEN // quantised_checkpoints.GROUP,
    "w13_weight_shape": 4,
    "w2_weight_packed": DOWN * INTERMEDIATE // 2,
    "w2_weight_scale": 2 * DOWN * INTERMEDIATE // quantised_checkpoints.GROUP,
    "w2_weight_shape": 4,
}
BFLOAT16 = {name: 2 * size for name, size in FP8.items()}
SLABS = {
    "bfloat16": [BFLOAT16] * 4,
    "fp8_block": [FP8 | {"w13_weight_scale_inv": 8, "w2_weight_scale_inv": 4}] * 4,
    "fp8_tensor": [FP8 | {"w13_weight_scale": 4, "w2_weight_scale": 4}] * 4,
    "fp8_static": [FP8 | {"w13_weight_scale": 4, "w2_weight_scale": 4}] * 4,
    "ct_fp8": [FP8 | ROWS] * 4,
    "ct_int8": [FP8 | ROWS] * 4,
    "ct_wna16": [WNA16] * 4,
    "ct_mixed": [FP8 | ROWS, FP8 | ROWS, WNA16, BFLOAT16],
}
"""Bytes of one expert in each slab, layer by layer."""
COMMON = {"fp8_static": ["w13_input_scale", "w2_input_scale"]}
"""What stays, where it is not what no kernel reads."""


@pytest.fixture(scope="module")
def checkpoint(vllm, tmp_path_factory):
    """A loaded checkpoint by its name. Tests change what they get: it is a copy."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def loaded(name):
        if name == "bfloat16":
            return loaded_models.load(quantised_checkpoints.TINY_MOE)
        return loaded_models.load(quantised_checkpoints.write_checkpoint(name, folder / name))

    def load(name):
        model = loaded(name)
        return LoadedModel(model.config, copy.deepcopy(model.layers))

    threads = torch.get_num_threads()
    with loaded_models.one_rank(folder), pytest.MonkeyPatch.context() as patch:
        reference_experts.install(patch.setattr)
        torch.set_num_threads(1)  # they would wait for each other longer than they compute
        yield load
    torch.set_num_threads(threads)


@pytest.fixture
def fp8_block(checkpoint):
    return checkpoint("fp8_block")


def find(model):
    return find_expert_tensors(model.layers)


def experts_of(model, layer=0):
    return model.layers[layer].routed_experts


def sizes(layer):
    return {slab.name: slab.size for slab in layer.slabs}


def unread(layer):
    """Slabs that no kernel reads."""
    return [name for name in sizes(layer) if name.endswith("_shape")]


def prove(model, layer=0):
    return prove_layer(model.layers[layer], find(model)[layer], model.config)


def ring_outputs(model):
    """Of the first layer, in float32."""
    outputs = []
    layer = model.layers[0]
    apply = layer.routed_experts.quant_method.apply

    def kept(**given):
        outputs.append(apply(**given).float())
        return outputs[-1]

    layer.routed_experts.quant_method.apply = kept
    compute_once(layer, model.config)
    return outputs[0]


@pytest.mark.parametrize("name", SLABS)
def test_each_layer_has_its_slabs_and_moves_are_exact(checkpoint, name):
    model = checkpoint(name)
    found = find(model)
    assert [sizes(layer) for layer in found] == SLABS[name]
    refuse_unmovable(found)
    for layer in found:
        assert all(slab.gapless for slab in layer.slabs)
        assert [*layer.fingerprints()] == COMMON.get(name, unread(layer))
    for number in {layer.signature: number for number, layer in enumerate(found)}.values():
        proof = prove(model, number)
        assert proof.verdict is Verdict.EXACT
        assert list(proof.unread) == unread(found[number])


@pytest.mark.parametrize("name", ["fp8_block", "fp8_tensor", "ct_int8", "ct_wna16"])
def test_the_reference_computes_nearly_what_unquantised_experts_do(checkpoint, name):
    exact, near = (ring_outputs(checkpoint(which)) for which in ("bfloat16", name))
    error = (near - exact).norm() / exact.norm()
    assert 0.0 < error < (0.15 if name == "ct_wna16" else 0.05)


def test_layers_of_other_precision_have_other_signatures(checkpoint):
    mixed = find(checkpoint("ct_mixed"))
    assert len({layer.signature for layer in mixed}) == 4
    assert [layer.expert_bytes for layer in mixed] == [50688, 50688, 27656, 98304]
    alike = find(checkpoint("fp8_block"))
    assert len({layer.signature for layer in alike}) == 1
    assert alike[0].scheme == "Fp8MoEMethod with ReferenceExperts"


def test_what_is_found_does_not_depend_on_the_run(checkpoint):
    first, again = find(checkpoint("ct_wna16")), find(checkpoint("ct_wna16"))
    assert [layer.signature for layer in first] == [layer.signature for layer in again]
    assert [layer.summary() for layer in first] == [layer.summary() for layer in again]


@pytest.mark.parametrize("name", ["bfloat16", "fp8_block", "ct_wna16"])
def test_two_neighbours_that_change_places_compute_the_same_bits(checkpoint, name):
    model = checkpoint(name)
    layer, config = experts_of(model), model.config
    hidden_TH = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids_TK = torch.stack([torch.arange(EXPERTS), torch.arange(EXPERTS).roll(1)], 1).int()
    weights_TK = torch.tensor([0.75, 0.25]).repeat(EXPERTS, 1)

    def compute(ids_TK):
        from vllm.forward_context import set_forward_context

        with set_forward_context(None, config, num_tokens=len(ids_TK)):
            return layer.quant_method.apply(
                layer, hidden_TH, weights_TK, ids_TK, None, None
            ).clone()

    before_TH = compute(ids_TK)
    slabs = find(model)[0].slabs
    for one in range(EXPERTS):
        other = (one + 1) % EXPERTS
        order = list(range(EXPERTS))
        order[one], order[other] = other, one
        for slab in slabs:
            slab.bytes_EB[[one, other]] = slab.bytes_EB[[other, one]]
        followed_TK = torch.tensor(order, dtype=torch.int32)[ids_TK.long()]
        assert torch.equal(compute(followed_TK), before_TH)
        stale_T = (compute(ids_TK) != before_TH).any(1)
        assert torch.equal(stale_T, ((ids_TK == one) | (ids_TK == other)).any(1))
        for slab in slabs:
            slab.bytes_EB[[one, other]] = slab.bytes_EB[[other, one]]


def test_experts_whose_class_a_model_derives_are_found_all_the_same(checkpoint):
    """gpt-oss, DBRX and the Transformers backend do; all else of a model's modules is left alone."""
    model = checkpoint("bfloat16")
    experts = experts_of(model)
    before = sizes(find(model)[0])
    derived = {"__module__": "vllm.model_executor.models.gpt_oss"}
    experts.__class__ = type("Derived", (type(experts),), derived)
    assert sizes(find(model)[0]) == before


def test_a_scale_that_only_the_quantisation_config_holds_is_found(fp8_block):
    described = experts_of(fp8_block).quant_method.moe_quant_config._w1
    described.scale = described.scale.detach().clone()
    layer = find(fp8_block)[0]
    assert sizes(layer)["quant_method.moe_quant_config._w1.scale"] == 8
    proof = prove(fp8_block)
    assert proof.verdict is Verdict.EXACT
    assert proof.unread == ("w13_weight_scale_inv",)


def test_a_scale_in_a_closure_is_found(fp8_block):
    method = experts_of(fp8_block).quant_method
    described = method.moe_quant_config._w2
    scale = described.scale.detach().clone()
    described.scale = None
    original = method.apply

    def apply(*args, **kwargs):
        described.scale = scale
        try:
            return original(*args, **kwargs)
        finally:
            described.scale = None

    method.apply = apply
    assert "quant_method.apply.<scale>" in sizes(find(fp8_block)[0])
    assert prove(fp8_block).verdict is Verdict.EXACT


_UNSEEN: dict[str, torch.Tensor] = {}


def test_a_scale_where_no_walk_comes_is_found_by_the_trial(fp8_block):
    """Among the globals of a module."""
    method = experts_of(fp8_block).quant_method
    described = method.moe_quant_config._w1
    _UNSEEN["scale"] = described.scale.detach().clone()

    def apply(*args, **kwargs):
        live, described.scale = described.scale, _UNSEEN["scale"]
        try:
            return type(method).apply(method, *args, **kwargs)
        finally:
            described.scale = live

    method.apply = apply
    layer = find(fp8_block)[0]
    assert layer.refusals == ()
    proof = prove(fp8_block)
    assert proof.verdict is Verdict.MISPLACED
    assert proof.tokens == tuple(range(EXPERTS))
    assert proof.unread == ("w13_weight_scale_inv",)


def test_a_tensor_that_two_hold_is_found_once(fp8_block):
    experts = experts_of(fp8_block)
    experts.same = experts.w13_weight.data
    experts.same_bytes = experts.w13_weight.data.view(torch.uint8)
    experts.gate = experts.w13_weight.data[:, :INTERMEDIATE]
    assert sizes(find(fp8_block)[0]) == SLABS["fp8_block"][0]


def test_a_copy_that_the_kernel_makes_at_its_first_call_is_found_after_one(fp8_block):
    experts = experts_of(fp8_block)
    kernel = experts.quant_method.moe_kernel.fused_experts
    original = kernel.apply

    def apply(**given):
        if not hasattr(kernel, "cached"):
            kernel.cached = given["w1"].clone()
        original(**given | {"w1": kernel.cached})

    kernel.apply = apply
    compute_once(fp8_block.layers[0], fp8_block.config)
    assert any("cached" in name for name in sizes(find(fp8_block)[0]))
    assert prove(fp8_block).verdict is Verdict.EXACT


def test_a_value_of_the_rank_that_is_spread_over_experts_is_to_be_compared(fp8_block):
    """vLLM does it where a kernel wants a scale for each expert (oracle/nvfp4.py)."""
    method = experts_of(fp8_block).quant_method
    method.moe_quant_config._a1.alpha_or_gscale = torch.tensor(0.25).repeat(EXPERTS)
    method.moe_quant_config._a2.alpha_or_gscale = torch.tensor([0.5]).expand(EXPERTS)
    method.limit = torch.tensor(7.0)
    layer = find(fp8_block)[0]
    activations = "quant_method.moe_quant_config._a"
    common = layer.fingerprints()
    assert set(common) == {
        f"{activations}1.alpha_or_gscale",
        f"{activations}2.alpha_or_gscale",
        "quant_method.limit",
    }
    assert f"{activations}1.alpha_or_gscale" in sizes(layer)
    assert f"{activations}2.alpha_or_gscale" not in sizes(layer)
    method.limit.fill_(8.0)
    changed = find(fp8_block)[0].fingerprints()
    assert {name for name in common if common[name] != changed[name]} == {"quant_method.limit"}


def test_ranks_that_hold_other_values_are_refused_with_the_name(checkpoint):
    model = checkpoint("ct_wna16")
    found = find(model)
    ours = [layer.summary() for layer in found]
    refuse_differences(found, [ours, json.loads(json.dumps(ours))])
    experts_of(model, 2).quant_method.limit = torch.tensor(7.0)
    theirs = [layer.summary() for layer in find(model)]
    with pytest.raises(
        ConfigurationError, match=r"EP ranks 0 and 1 in quant_method\.limit"
    ) as raised:
        refuse_differences(found, [ours, theirs])
    assert "model.layers.2.mlp.experts" in raised.value.reason
    experts_of(model, 1).w13_weight_shape.data.fill_(1)
    theirs = [layer.summary() for layer in find(model)]
    with pytest.raises(ConfigurationError, match="EP ranks 0 and 2 in w13_weight_shape"):
        refuse_differences(found, [ours, ours, theirs])


def test_experts_of_one_rank_may_have_the_same_scale_by_chance(checkpoint):
    model = checkpoint("fp8_tensor")
    found = find(model)
    ours = [layer.summary() for layer in found]
    experts_of(model, 1).w2_weight_scale.data.fill_(0.25)
    by_chance = [layer.summary() for layer in find(model)]
    assert "w2_weight_scale" in by_chance[1]
    refuse_differences(found, [by_chance, ours, ours])
    refuse_differences(found, [ours, ours, by_chance])
    experts_of(model, 1).w2_weight_scale.data.fill_(0.5)
    spread = [layer.summary() for layer in find(model)]
    with pytest.raises(ConfigurationError, match="EP ranks 0 and 1 in w2_weight_scale"):
        refuse_differences(found, [by_chance, spread])


def test_an_error_on_the_way_is_a_refusal_that_other_ranks_hear(fp8_block):
    experts_of(fp8_block).quant_method.gone = weakref.proxy(torch.nn.Module())
    layer = find(fp8_block)[0]
    assert "ReferenceError" in layer.summary()["refusals"]


def test_weights_that_are_loaded_later_must_hold_what_ranks_compared(checkpoint):
    model = checkpoint("ct_wna16")
    compared = [layer.summary() for layer in find(model)]
    experts = experts_of(model, 1)
    experts.w13_weight_scale.data.mul_(2)  # which moves with its expert
    assert refusal_of_change(compared, find(model)) == ""
    experts.w13_weight_shape.data.fill_(1)
    told = refusal_of_change(compared, find(model))
    assert "layer 'model.layers.1.mlp.experts' has other values of w13_weight_shape" in told
    experts_of(model).quant_method.hidden = itertools.count()
    assert "cannot be seen" in refusal_of_change(compared, find(model))


def test_what_one_rank_refuses_is_refused_by_all(fp8_block):
    found = find(fp8_block)
    ours = [layer.summary() for layer in found]
    experts_of(fp8_block).quant_method.hidden = itertools.count()
    theirs = [layer.summary() for layer in find(fp8_block)]
    with pytest.raises(ConfigurationError, match="EP ranks 0 and 1 in refusals"):
        refuse_differences(found, [ours, theirs])


def test_ranks_with_other_kernels_are_refused(checkpoint):
    found, others = find(checkpoint("ct_fp8")), find(checkpoint("fp8_tensor"))
    summaries = [[layer.summary() for layer in layers] for layers in (found, others)]
    with pytest.raises(ConfigurationError, match="kernel, expert's part of w13_weight_scale"):
        refuse_differences(found, summaries)


def test_tables_of_slots_and_what_belongs_to_logical_experts_are_left_alone(fp8_block):
    experts = experts_of(fp8_block)
    experts.e_score_correction_bias = torch.rand(EXPERTS)
    experts.register_buffer("_expert_map", torch.arange(EXPERTS), persistent=False)
    experts.register_buffer("expert_local_to_global", torch.arange(EXPERTS), persistent=False)
    experts.quant_method.moe_kernel.prepare_finalize.local_ids = torch.arange(EXPERTS)
    layer = find(fp8_block)[0]
    assert sizes(layer) == SLABS["fp8_block"][0]
    assert layer.fingerprints() == {}


def test_names_that_are_left_alone_are_still_vllms(vllm):
    """A name that vLLM changed would be walked into."""
    import inspect

    from vllm.model_executor.layers.fused_moe import modular_kernel, routed_experts

    source = inspect.getsource(routed_experts) + inspect.getsource(modular_kernel)
    missing = {name for name in expert_tensors._NOT_OF_EXPERTS if name not in source}
    assert missing == set()


def test_what_cannot_be_seen_is_refused_with_its_name(fp8_block):
    kernel = experts_of(fp8_block, 2).quant_method.moe_kernel.fused_experts
    kernel.cache = itertools.count()
    with pytest.raises(ConfigurationError, match="cannot be seen") as raised:
        refuse_unmovable(find(fp8_block))
    assert "model.layers.2.mlp.experts" in raised.value.reason
    assert "fused_experts.cache" in raised.value.reason
    assert "itertools.count" in raised.value.reason
    assert "mode=observe" in raised.value.remedy


def test_shared_experts_among_the_routed_ones_are_refused(fp8_block):
    experts_of(fp8_block).expert_map_manager.num_fused_shared_experts = 1
    with pytest.raises(ConfigurationError, match="1 shared experts are among the routed ones"):
        refuse_unmovable(find(fp8_block))


def test_layers_that_share_their_experts_memory_are_refused(fp8_block):
    first, second = (experts_of(fp8_block, layer) for layer in (0, 1))
    second.w13_weight = first.w13_weight
    with pytest.raises(ConfigurationError, match="in the same memory as one of") as raised:
        refuse_unmovable(find(fp8_block))
    assert "'model.layers.1.mlp.experts' cannot move: w13_weight" in raised.value.reason


def test_views_that_disagree_where_an_expert_begins_are_refused(fp8_block):
    experts = experts_of(fp8_block)
    memory = torch.zeros(EXPERTS + 1, 4)
    experts.one, experts.other = memory[:EXPERTS], memory[1:]
    with pytest.raises(ConfigurationError, match="do not agree where an expert begins"):
        refuse_unmovable(find(fp8_block))


def test_a_layer_without_experts_of_its_own_is_refused():
    experts = SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        local_num_experts=4,
        quant_method=SimpleNamespace(is_monolithic=False),
        expert_map_manager=SimpleNamespace(),
    )
    with pytest.raises(ConfigurationError, match="no tensor holds one expert after another"):
        refuse_unmovable(find_expert_tensors([SimpleNamespace(routed_experts=experts)]))


# Layouts whose kernels run on GPUs only. They are made as vLLM makes them, and where they keep the
# shape that the reference reads, the trial is made, too.


def test_scales_that_deepgemm_wants_by_columns_and_padded_are_found(fp8_block):
    """`get_mn_major_tma_aligned_tensor` of DeepGEMM, whose strides `per_token_group_quant_fp8` has, too
    (quantization/utils/fp8_utils.py).
    """
    experts = experts_of(fp8_block)
    scale = experts.w13_weight_scale_inv.data
    _, rows, columns = scale.shape
    aligned = 4  # rows, to 16 bytes
    padded = torch.empty_strided(scale.shape, (aligned * columns, 1, aligned))
    padded.copy_(scale)
    replace(experts, "w13_weight_scale_inv", padded)
    layer = find(fp8_block)[0]
    (slab,) = (slab for slab in layer.slabs if slab.name == "w13_weight_scale_inv")
    assert (slab.size, slab.bytes_EB.stride(0)) == (4 * rows, 4 * aligned)
    assert not slab.gapless
    assert prove(fp8_block).verdict is Verdict.EXACT


def test_scales_by_columns_without_padding_are_gapless(checkpoint):
    model = checkpoint("ct_wna16")
    experts = experts_of(model)
    scale = experts.w13_weight_scale.data
    replace(experts, "w13_weight_scale", scale.transpose(1, 2).contiguous().transpose(1, 2))
    layer = find(model)[0]
    assert all(slab.gapless for slab in layer.slabs)
    assert sizes(layer) == WNA16
    assert prove(model).verdict is Verdict.EXACT


def replace(experts, name, tensor):
    """As a quantisation method replaces what it loaded, with a quantisation config to match."""
    from vllm.model_executor.utils import replace_parameter

    replace_parameter(experts, name, tensor)
    described = getattr(
        experts.quant_method.moe_quant_config, f"_{name[:3].replace('13', '1')[:2]}"
    )
    described.scale = getattr(experts, name)


def test_weights_that_marlin_repacks_are_found(fp8_block, monkeypatch):
    """vLLM's own repacking, but for the kernel that shuffles one expert's words: only GPUs have it."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8

    def shuffled(b_q_weight, size_k, size_n, num_bits, **_):
        return b_q_weight.contiguous().view(size_k // 16, size_n * 16 * num_bits // 32)

    monkeypatch.setattr(ops, "gptq_marlin_repack", shuffled, raising=False)
    monkeypatch.setattr(marlin_utils_fp8, "get_marlin_input_dtype", lambda *_: None)
    experts = experts_of(fp8_block)
    experts.orig_dtype, experts.num_experts = torch.bfloat16, EXPERTS
    names = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")
    packed = marlin_utils_fp8.prepare_fp8_moe_layer_for_marlin(
        experts, *(getattr(experts, name) for name in names)
    )
    for name, tensor in zip(names, packed, strict=True):
        setattr(experts, name, torch.nn.Parameter(tensor, requires_grad=False))
    experts.quant_method._init_moe_kernel(experts)
    scales = {"w13_weight_scale_inv": 2 * GATE_UP, "w2_weight_scale_inv": 2 * DOWN}
    assert sizes(find(fp8_block)[0]) == FP8 | scales


def test_scales_and_alphas_of_nvfp4_are_found_outside_the_parameters(fp8_block, monkeypatch):
    """vLLM's preparation for its CUTLASS kernel and the quantisation config that it makes."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
        NvFp4MoeBackend,
        convert_to_nvfp4_moe_kernel_format,
        make_nvfp4_moe_quant_config,
    )

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    experts = experts_of(fp8_block)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    given = {
        "w13": draw(EXPERTS, GATE_UP, HIDDEN // 2).mul(255).to(torch.uint8),
        "w13_scale": draw(EXPERTS, GATE_UP, HIDDEN // 16).to(torch.float8_e4m3fn),
        "w13_scale_2": draw(EXPERTS),
        "a13_scale": draw(EXPERTS, 2),
        "w2": draw(EXPERTS, DOWN, INTERMEDIATE // 2).mul(255).to(torch.uint8),
        "w2_scale": draw(EXPERTS, DOWN, INTERMEDIATE // 16).to(torch.float8_e4m3fn),
        "w2_scale_2": draw(EXPERTS),
        "a2_scale": draw(EXPERTS),
    }
    backend = NvFp4MoeBackend.VLLM_CUTLASS
    made = convert_to_nvfp4_moe_kernel_format(backend, experts, **given, is_act_and_mul=True)
    made = dict(zip(given, made, strict=True))
    for name in list(dict(experts.named_parameters())):
        delattr(experts, name)
    parameters = {name: name for name in ("w13_scale", "w13_scale_2", "w2_scale", "w2_scale_2")}
    for name in ("w13", "w2", *parameters):
        experts.register_parameter(name, torch.nn.Parameter(made[name], requires_grad=False))
    scales = {name: getattr(experts, name) for name in parameters}
    config = make_nvfp4_moe_quant_config(
        backend, **scales, a13_scale=made["a13_scale"], a2_scale=made["a2_scale"]
    )
    experts.quant_method.moe_quant_config = config
    experts.quant_method.moe_kernel = SimpleNamespace(
        fused_experts=SimpleNamespace(quant_config=config), is_monolithic=False
    )
    activations = "quant_method.moe_quant_config._a"
    assert sizes(find(fp8_block)[0]) == {
        "w13": GATE_UP * HIDDEN // 2,
        "w13_scale": GATE_UP * HIDDEN // 16,
        "w13_scale_2": 4,
        "w2": DOWN * INTERMEDIATE // 2,
        "w2_scale": DOWN * INTERMEDIATE // 16,
        "w2_scale_2": 4,
        f"{activations}1.alpha_or_gscale": 4,
        f"{activations}2.alpha_or_gscale": 4,
    }


def test_scales_that_a_kernel_views_tile_by_tile_are_found_once(fp8_block):
    """The view that CuteDSL gets (`convert_sf_to_mma_layout` of FlashInfer): the experts come last."""
    experts = experts_of(fp8_block)
    scale = torch.rand(EXPERTS, GATE_UP, HIDDEN // 16).to(torch.float8_e4m3fn)
    tiles = scale.view(EXPERTS, GATE_UP // 128, HIDDEN // 64, 32, 4, 4)
    experts.swizzled = torch.nn.Parameter(scale, requires_grad=False)
    experts.quant_method.moe_quant_config._w1.alpha_or_gscale = tiles.permute(3, 4, 1, 5, 2, 0)
    size = GATE_UP * HIDDEN // 16
    assert sizes(find(fp8_block)[0]) == SLABS["fp8_block"][0] | {"swizzled": size}
    del experts.swizzled
    name = "quant_method.moe_quant_config._w1.alpha_or_gscale"
    assert sizes(find(fp8_block)[0]) == SLABS["fp8_block"][0] | {name: size}


def test_weights_and_scales_in_objects_of_triton_kernels_are_found(fp8_block):
    """Their form as of triton_kernels/tensor.py: a tensor is a dataclass around a storage, which holds
    the bytes; `w13_precision_config` of the method holds the scales (quantization/mxfp4.py).
    """

    @dataclasses.dataclass
    class Storage:
        data: torch.Tensor
        layout: object = None

    @dataclasses.dataclass
    class Tensor:
        storage: Storage
        shape: list[int]

    @dataclasses.dataclass(frozen=True)
    class PrecisionConfig:
        weight_scale: Tensor
        flex_ctx: tuple = ()

    def wrapped(rows, columns):
        memory = torch.zeros(EXPERTS, columns, rows, dtype=torch.uint8)
        return Tensor(Storage(memory.transpose(1, 2)), [EXPERTS, rows, columns])

    experts = experts_of(fp8_block)
    experts.w13_weight = None
    experts.w13_weight_triton_tensor = wrapped(HIDDEN // 2, GATE_UP)
    config = PrecisionConfig(weight_scale=wrapped(HIDDEN // 32, GATE_UP))
    experts.quant_method.w13_precision_config = config
    found = sizes(find(fp8_block)[0])
    assert found["w13_weight_triton_tensor.storage.data"] == GATE_UP * HIDDEN // 2
    scales = "quant_method.w13_precision_config.weight_scale.storage.data"
    assert found[scales] == GATE_UP * HIDDEN // 32


# What the trial asks of a kernel.


@pytest.fixture
def asked(monkeypatch):
    """What the kernel of a model's first layer is called with from now on."""

    def listen(model):
        method, calls = experts_of(model).quant_method, []
        original = method.apply

        def apply(**given):
            calls.append(SimpleNamespace(**given))
            return original(**given)

        monkeypatch.setattr(method, "apply", apply)
        return calls

    return listen


def ring_of(model):
    return expert_proof._Trial(model.layers[0], model.config), expert_proof._ring(model.layers[0])


def test_a_token_goes_to_different_experts_of_which_one_counts(fp8_block, asked):
    calls = asked(fp8_block)
    trial, ids_TK = ring_of(fp8_block)
    ids_TK[:] = 3
    trial.compute(ids_TK)
    assert calls[0].topk_ids.tolist() == [[3, 4]] * EXPERTS
    assert calls[0].topk_weights.tolist() == [[1.0, 0.0]] * EXPERTS


def test_a_scale_of_all_tokens_is_taken_from_the_expert_that_was_asked_for(checkpoint, asked):
    model = checkpoint("fp8_tensor")
    calls = asked(model)
    trial, ids_TK = ring_of(model)
    ids_TK[:] = 3
    trial.compute(ids_TK)
    assert calls[0].topk_ids.tolist() == [[3, 3]] * EXPERTS


def test_a_rank_with_fewer_experts_than_a_token_wants_has_those_of_others_follow(fp8_block):
    trial, _ = ring_of(fp8_block)
    trial._local, trial._top_k = 3, 5
    trial._first_slot_R11 = torch.tensor([3, 12]).view(-1, 1, 1)
    slots_RTK = trial._slots_RTK(torch.tensor([[0, 1], [2, 0]]))
    assert slots_RTK.tolist() == [
        [[3, 4, 5, 6, 7], [5, 3, 4, 6, 7]],
        [[12, 13, 14, 15, 0], [14, 12, 13, 15, 0]],
    ]


@pytest.mark.parametrize(("name", "most"), [("fp8_block", 5), ("fp8_tensor", 2)])
def test_no_expert_gets_more_tokens_at_once_than_buffers_have_room_for(
    checkpoint, asked, name, most
):
    model = checkpoint(name)
    experts_of(model).moe_config.max_num_tokens = 5
    calls = asked(model)
    assert prove(model).verdict is Verdict.EXACT
    assert {len(call.topk_ids) for call in calls} == {most, EXPERTS % most or most}


def test_columns_that_vllm_pads_hold_nothing_and_are_not_compared(fp8_block, asked):
    config = experts_of(fp8_block).moe_config
    config.hidden_dim_unpadded = HIDDEN - 32
    calls = asked(fp8_block)
    trial, ids_TK = ring_of(fp8_block)
    assert trial.compute(ids_TK).shape == (EXPERTS, HIDDEN - 32)
    assert calls[0].x.shape == (EXPERTS, HIDDEN)
    assert not calls[0].x[:, HIDDEN - 32 :].any()


def test_sequence_parallel_ranks_have_the_tokens_that_vllm_makes_of_their_number(
    fp8_block, monkeypatch
):
    from vllm import forward_context

    experts_of(fp8_block).moe_config.moe_parallel_config.sp_size = 4
    original, counted = forward_context.set_forward_context, []

    def counting(*args, num_tokens, **more):
        counted.append(num_tokens)
        return original(*args, num_tokens=num_tokens, **more)

    monkeypatch.setattr(forward_context, "set_forward_context", counting)
    trial, ids_TK = ring_of(fp8_block)
    trial.compute(ids_TK)
    sizes = forward_context._compute_sp_num_tokens(torch.tensor(counted * 2), 4)
    assert sizes == [EXPERTS] * 8
