"""What vLLM makes of a quantised checkpoint, told from its files."""

from __future__ import annotations

import pytest
from quantised_checkpoints import CHECKPOINTS

from ep_rebalance.config import ConfigurationError, QuantisationConfig
from ep_rebalance.engines.vllm import quantised_schemes
from ep_rebalance.engines.vllm.quantised_schemes import (
    ACCELERATORS,
    Scheme,
    refuse_schemes,
    schemes_of,
)

REFUSE, TRY = QuantisationConfig(), QuantisationConfig(unlisted="self_test")


def numbers(kind: str, bits: int, **more: object) -> dict[str, object]:
    return {"type": kind, "num_bits": bits, "strategy": "channel", **more}


def compressed(weights: dict[str, object], inputs: dict[str, object] | None) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


FORMATS = {
    "DeepSeek-V3": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "Fp8MoEMethod"),
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "Fp8MoEMethod"),
    "fp8 static": ({"quant_method": "fp8", "activation_scheme": "static"}, "Fp8MoEMethod"),
    "fp8 that stores mxfp4": ({"quant_method": "fp8", "store_dtype": "mxfp4"}, "Mxfp4MoEMethod"),
    "Kimi K2": (
        compressed(numbers("int", 4, strategy="group", group_size=32), None),
        "CompressedTensorsWNA16MoEMethod",
    ),
    "int8": (
        compressed(numbers("int", 8), numbers("int", 8, dynamic=True)),
        "CompressedTensorsW8A8Int8MoEMethod",
    ),
    "nvfp4": (
        compressed(numbers("float", 4, group_size=16), numbers("float", 4, group_size=16)),
        "CompressedTensorsW4A4Nvfp4MoEMethod",
    ),
    "mxfp4": (
        compressed(numbers("float", 4, group_size=32), None),
        "CompressedTensorsW4A4Mxfp4MoEMethod",
    ),
    "mxfp4, fp8": (
        compressed(numbers("float", 4, group_size=32), numbers("float", 8)),
        "CompressedTensorsW4A8Mxfp4MoEMethod",
    ),
    "mxfp8": (
        compressed(numbers("float", 8, group_size=32), numbers("float", 8)),
        "CompressedTensorsW8A8Mxfp8MoEMethod",
    ),
    "int4, fp8": (
        compressed(numbers("int", 4), numbers("float", 8)),
        "CompressedTensorsW4A8Fp8MoEMethod",
    ),
    "int4, int8": (
        compressed(numbers("int", 4), numbers("int", 8)),
        "CompressedTensorsW4A8Int8MoEMethod",
    ),
    "compressed-tensors of 2 bits": (compressed(numbers("float", 2), None), ""),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "ModelOptFp8MoEMethod"),
    "modelopt fp4": (
        {"quant_method": "modelopt", "quant_algo": "nvfp4"},
        "ModelOptNvFp4FusedMoE",
    ),
    "modelopt, in a file of its own": (
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
        "ModelOptNvFp4FusedMoE",
    ),
    "modelopt mxfp8": (
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        "ModelOptMxFp8FusedMoE",
    ),
    "modelopt, new": ({"quant_method": "modelopt", "quant_algo": "FP2"}, ""),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "AutoAWQMoEMethod"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "AutoGPTQMoEMethod"),
    "AutoRound": ({"quant_method": "auto-round"}, "AutoGPTQMoEMethod"),
    "AutoRound of MXFP4": (
        {"quant_method": "auto-round", "data_type": "mx_fp"},
        "INCMxfp4MoEMethod",
    ),
    "Quark": ({"quant_method": "quark"}, "QuarkOCP_MX_MoEMethod"),
    "new": ({"quant_method": "new"}, ""),
    "nameless": ({}, ""),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_method_of_a_format_is_known(name: str):
    quantisation, method = FORMATS[name]
    (scheme,) = schemes_of(quantisation)
    assert scheme.method == method
    assert scheme.format


@pytest.mark.parametrize(
    ("model", "quantisation", "method"),
    [
        ({"model_type": "gpt_oss"}, {"quant_method": "mxfp4"}, "GptOssMxfp4MoEMethod"),
        ({}, {"quant_method": "mxfp4"}, "Mxfp4MoEMethod"),
        ({"model_type": "deepseek_v4"}, {"quant_method": "fp8"}, "Mxfp4MoEMethod"),
        (
            {"model_type": "deepseek_v4", "expert_dtype": "fp8"},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "Fp8MoEMethod",
        ),
        (
            {"model_type": "deepseek_v4"},
            {"quant_method": "fp8", "moe_quant_algo": "NVFP4"},
            "ModelOptNvFp4FusedMoE",
        ),
    ],
)
def test_some_formats_depend_on_the_model(model, quantisation, method):
    (scheme,) = schemes_of(quantisation, model)
    assert scheme.method == method


def test_each_part_of_a_mixed_checkpoint_is_told():
    methods = [scheme.method for scheme in schemes_of(CHECKPOINTS["ct_mixed"].config)]
    assert methods == [
        "CompressedTensorsW8A8Fp8MoEMethod",
        "CompressedTensorsW8A8Int8MoEMethod",
        "CompressedTensorsWNA16MoEMethod",
    ]
    layers = {
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4"},
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
    }
    held = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (scheme,) = schemes_of({"quant_method": "modelopt", **held})
    assert scheme.method == "ModelOptNvFp4FusedMoE"


def all_schemes() -> list[Scheme]:
    named = [quantised_schemes._BY_NAME[name] for name in quantised_schemes._BY_NAME]
    read = [scheme for quantisation, _ in FORMATS.values() for scheme in schemes_of(quantisation)]
    return named + read


def test_each_likely_kernel_is_in_the_list_with_its_method():
    for scheme in all_schemes():
        for accelerator in ACCELERATORS:
            for pair in scheme.pairs(accelerator):
                assert pair.reason != "never read", pair.name


def test_a_listed_method_has_a_listed_kernel_on_some_gpu():
    for scheme in all_schemes():
        if any(scheme.kernels.values()) and scheme.method != "Nvfp4OnlineMoEMethod":
            verdicts = {pair.verdict for name in ACCELERATORS for pair in scheme.pairs(name)}
            assert "listed" in verdicts or scheme.method == "MoeWNA16Method", scheme.format


def test_hopper_takes_humming_before_marlin():
    """As vllm/model_executor/layers/quantization/utils/humming/priority.py has it."""
    (scheme,) = schemes_of(FORMATS["Kimi K2"][0])
    assert [pair.verdict for pair in scheme.pairs("H100")] == ["unlisted", "listed"]
    assert [pair.verdict for pair in scheme.pairs("A100")] == ["listed"]


def test_where_marlin_is_missing_another_method_is_told():
    (scheme,) = schemes_of(FORMATS["AWQ"][0])
    assert [pair.name for pair in scheme.pairs("ROCm")] == [
        "MoeWNA16Method with TritonWNA16Experts"
    ]


def test_one_way_that_may_move_is_enough():
    """Which of them the experts are only the model tells."""
    quantisation = {"config_groups": {}, **CHECKPOINTS["ct_mixed"].config}
    groups = {
        **quantisation["config_groups"],
        **compressed(numbers("float", 2), None)["config_groups"],
    }
    refuse_schemes(schemes_of({**quantisation, "config_groups": groups}), REFUSE)


@pytest.mark.parametrize("name", ["new", "compressed-tensors of 2 bits", "mxfp8", "Quark"])
def test_what_is_unlisted_with_every_kernel_may_be_tried(name: str):
    schemes = schemes_of(FORMATS[name][0])
    with pytest.raises(ConfigurationError, match=r"quantisation\.unlisted=self_test") as caught:
        refuse_schemes(schemes, REFUSE)
    assert schemes[0].format in caught.value.reason
    refuse_schemes(schemes, TRY)


def test_what_is_refused_with_every_kernel_may_not():
    schemes = schemes_of(FORMATS["int4, int8"][0])
    with pytest.raises(ConfigurationError, match="without expert parallelism") as caught:
        refuse_schemes(schemes, TRY)
    assert "unlisted" not in caught.value.remedy
