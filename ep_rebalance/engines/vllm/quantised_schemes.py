"""What vLLM makes of a quantised checkpoint: the quantisation method of its experts, and the kernels that it
tries, in its order, on each kind of accelerator.

Read from `quantization_config` of config.json, or ModelOpt's hf_quant_config.json, as vLLM 0.32 and 0.33 read
them (vllm/model_executor/layers/quantization/, fused_moe/oracle/). Nothing of vLLM is imported: it is asked
before there is a server, for machines that are elsewhere. What a kernel needs installed is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from ep_rebalance.config import QuantisationConfig
from ep_rebalance.engines.vllm.quantised_pairs import (
    Pair,
    pair_of,
    pairs_of_method,
    refuse_pair,
)

Accelerator = Literal["H100", "Blackwell", "A100", "ROCm", "CPU"]
"""H100 stands for Hopper, Blackwell for its data centre GPUs, A100 for what has no 8-bit floats."""
ACCELERATORS: tuple[Accelerator, ...] = get_args(Accelerator)

Kernels = Mapping[Accelerator, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way in which experts are quantised.

    format: in a user's words. method: vLLM's class, "" if it is not known.
    kernels: those that vLLM tries where experts are to move and are spread over ranks, in its order.
    elsewhere: the method that vLLM takes on some accelerators instead.
    """

    format: str
    method: str
    kernels: Kernels = field(default_factory=lambda: MappingProxyType({}))
    elsewhere: Mapping[Accelerator, str] = field(default_factory=lambda: MappingProxyType({}))

    def pairs(self, accelerator: Accelerator) -> tuple[Pair, ...]:
        """In vLLM's order; none if it has no kernel there."""
        method = self.elsewhere.get(accelerator, self.method)
        return tuple(pair_of(method, kernel) for kernel in self.kernels.get(accelerator, ()))


def schemes_of(
    quantisation: Mapping[str, Any], model: Mapping[str, Any] | None = None
) -> tuple[Scheme, ...]:
    """Of the experts; several where parts of the model are quantised in several ways.

    quantisation: as the checkpoint has it, or {"quant_method": NAME} for what `--quantization` makes.
    model: the rest of config.json.
    """
    model = model or {}
    name = str(quantisation.get("quant_method") or "").lower()
    if name.startswith("modelopt") or "quantization" in quantisation:
        found = [_modelopt(algorithm) for algorithm in _modelopt_algorithms(quantisation)]
    elif name == "compressed-tensors":
        found = [_compressed(group) for group in _groups(quantisation)]
    elif str(model.get("model_type", "")).startswith("deepseek_v4"):
        found = [_deepseek_v4(quantisation, model)]
    elif name == "fp8":
        found = [_fp8(quantisation)]
    elif name == "quark":
        found = [_quark(quantisation)]
    elif name in ("auto-round", "inc"):
        found = [_auto_round(quantisation)]
    elif name in ("mxfp4", "gpt_oss_mxfp4"):
        gpt_oss = name == "gpt_oss_mxfp4" or model.get("model_type") == "gpt_oss"
        found = [_GPT_OSS if gpt_oss else _MXFP4]
    else:
        found = [_BY_NAME.get(name) or _unknown(name)]
    return tuple({scheme.format: scheme for scheme in found}.values()) or (_unknown(name),)


def refuse_schemes(schemes: Sequence[Scheme], quantisation: QuantisationConfig) -> None:
    """Raises ConfigurationError for a checkpoint whose experts could move on no accelerator.

    Everything else depends on the kernel, which is known once the model is loaded.
    """
    if not any(_may_move(scheme, quantisation) for scheme in schemes):
        refuse_pair(_nearest(schemes[0]), quantisation, f"this checkpoint ({schemes[0].format})")


def _may_move(scheme: Scheme, quantisation: QuantisationConfig) -> bool:
    """With some kernel."""
    verdicts = {pair.verdict for pair in _entries(scheme)}
    return "listed" in verdicts or ("unlisted" in verdicts and quantisation.unlisted == "self_test")


def _nearest(scheme: Scheme) -> Pair:
    return min(_entries(scheme), key=lambda pair: ("unlisted", "refused").index(pair.verdict))


def _entries(scheme: Scheme) -> tuple[Pair, ...]:
    return pairs_of_method(scheme.method) or (
        pair_of(scheme.method or scheme.format, "any kernel"),
    )


def _kernels(**by_accelerator: Sequence[str]) -> Kernels:
    return MappingProxyType({name: tuple(by_accelerator.get(name, ())) for name in ACCELERATORS})


_HUMMING = ("HummingIndexedExperts",)
"""Before Marlin on Hopper, where it is installed (quantization/utils/humming/priority.py)."""
_MARLIN = ("MarlinExperts",)
_WEIGHTS_ALONE = _kernels(H100=_HUMMING + _MARLIN, Blackwell=_MARLIN, A100=_MARLIN)
"""For what computes in 16 bits, from weights of four."""

_DEEP_GEMM = ("TritonOrDeepGemmExperts", "TritonExperts")
_FP8_BLOCK = _kernels(
    H100=("FlashInferExperts", *_DEEP_GEMM),
    Blackwell=_DEEP_GEMM,
    A100=_MARLIN,
    ROCm=("AiterFp8BlockExperts", "TritonExperts"),
    CPU=("CPUExpertsFp8W8A8", "CPUExpertsFp8"),
)
_FP8_TENSOR = _kernels(
    H100=("TritonExperts",),
    Blackwell=("TritonExperts",),
    A100=_MARLIN,
    ROCm=("AiterFp8TensorExperts", "TritonExperts"),
)
_FP8_STATIC = _kernels(
    H100=("FlashInferExperts", "TritonExperts"),
    Blackwell=("FlashInferExperts", "TritonExperts"),
    A100=_MARLIN,
    ROCm=("AiterFp8TensorExperts", "TritonExperts"),
)
_FP8_ROW = _kernels(
    H100=("TritonOrCutlassExperts", "TritonExperts"),
    Blackwell=("TritonOrCutlassExperts", "TritonExperts"),
    A100=_MARLIN,
    ROCm=("AiterFp8ChannelExperts", "TritonExperts"),
)
_INT8 = _kernels(
    **dict.fromkeys(("H100", "Blackwell", "A100", "ROCm"), ("TritonExperts",)),
    CPU=("CPUExpertsInt8",),
)
_INT4 = _kernels(
    H100=_HUMMING + _MARLIN,
    Blackwell=_MARLIN,
    A100=_MARLIN,
    ROCm=("TritonWNA16Experts",),
    CPU=("CPUExpertsInt4",),
)
_FP4 = _kernels(
    H100=_HUMMING + _MARLIN,
    Blackwell=(
        "TrtLlmNvFp4ExpertsModular",
        "FlashInferCuteDSLExperts",
        "FlashInferExperts",
        "CutlassExpertsFp4",
        "MarlinExperts",
    ),
    A100=_MARLIN,
    ROCm=("Nvfp4QuantizationEmulationTritonExperts",),
)
_FP4_IN_BLOCKS = _kernels(
    H100=_HUMMING + _MARLIN,
    Blackwell=("TrtLlmMxfp4ExpertsModular", "DeepGemmFP4Experts", "MarlinExperts"),
    A100=_MARLIN,
    ROCm=("AiterMxfp4Experts",),
    CPU=("CPUExpertsMxfp4",),
)

_MXFP4 = Scheme(format="MXFP4", method="Mxfp4MoEMethod", kernels=_FP4_IN_BLOCKS)
_GPT_OSS = Scheme(format="MXFP4 of gpt-oss", method="GptOssMxfp4MoEMethod")
_NVFP4 = Scheme(format="ModelOpt NVFP4", method="ModelOptNvFp4FusedMoE", kernels=_FP4)
_FP8_IN_BLOCKS = Scheme(format="FP8, a scale per block", method="Fp8MoEMethod", kernels=_FP8_BLOCK)
_WITHOUT_MARLIN: Mapping[Accelerator, str] = MappingProxyType({"ROCm": "MoeWNA16Method"})
_AWQ = Scheme(format="AWQ", method="AutoAWQMoEMethod", kernels=_INT4, elsewhere=_WITHOUT_MARLIN)
_GPTQ = Scheme(format="GPTQ", method="AutoGPTQMoEMethod", kernels=_INT4, elsewhere=_WITHOUT_MARLIN)
_MADE = "made from an unquantised checkpoint"

_BY_NAME: Mapping[str, Scheme] = MappingProxyType(
    {
        **dict.fromkeys(("awq", "auto_awq", "awq_marlin"), _AWQ),
        **dict.fromkeys(("gptq", "auto_gptq", "gptq_marlin"), _GPTQ),
        "moe_wna16": Scheme(
            format="GPTQ or AWQ by moe_wna16",
            method="MoeWNA16Method",
            kernels=_kernels(
                **dict.fromkeys(("H100", "Blackwell", "A100", "ROCm"), ("TritonWNA16Experts",))
            ),
        ),
        "fp8_per_tensor": Scheme(
            format=f"FP8, a scale per tensor, {_MADE}",
            method="Fp8PerTensorOnlineMoEMethod",
            kernels=_FP8_TENSOR,
        ),
        "fp8_per_block": Scheme(
            format=f"FP8, a scale per block, {_MADE}",
            method="Fp8PerBlockOnlineMoEMethod",
            kernels=_FP8_BLOCK,
        ),
        "fp8_per_channel": Scheme(
            format=f"FP8, a scale per row, {_MADE}",
            method="Fp8PtpcOnlineMoEMethod",
            kernels=MappingProxyType({**_FP8_ROW, "A100": ()}),
        ),
        **dict.fromkeys(
            ("int8_per_channel_weight_only", "experts_int8"),
            Scheme(format=f"INT8 {_MADE}", method="Int8OnlineMoEMethod", kernels=_INT8),
        ),
        "nvfp4_per_token": Scheme(
            format=f"NVFP4 {_MADE}",
            method="Nvfp4OnlineMoEMethod",
            kernels=_kernels(Blackwell=("TrtLlmNvFp4ExpertsModular",)),
        ),
        "mxfp8": Scheme(format="MXFP8", method="ModelOptMxFp8FusedMoE"),
        "humming": Scheme(format="--quantization humming", method="HummingMoEMethod"),
        "online": Scheme(
            format=f"as --quantization-config says, {_MADE}", method="Int8OnlineMoEMethod"
        ),
    }
)


def _unknown(name: str) -> Scheme:
    return Scheme(format=name or "unknown method", method="")


def _fp8(quantisation: Mapping[str, Any]) -> Scheme:
    if quantisation.get("store_dtype") == "mxfp4":
        return _MXFP4
    if quantisation.get("weight_block_size"):
        return _FP8_IN_BLOCKS
    static = quantisation.get("activation_scheme") == "static"
    return Scheme(
        format="FP8, a scale per tensor" + (", static activations" if static else ""),
        method="Fp8MoEMethod",
        kernels=_FP8_STATIC if static else _FP8_TENSOR,
    )


def _quark(quantisation: Mapping[str, Any]) -> Scheme:
    weights = (quantisation.get("global_quant_config") or {}).get("weight") or {}
    kind = str(weights.get("dtype", "")) if isinstance(weights, Mapping) else ""
    method = {"fp8_e4m3": "QuarkW8A8Fp8MoEMethod", "int8": "QuarkW8A8Int8MoEMethod"}
    return Scheme(format=f"Quark {kind}".rstrip(), method=method.get(kind, "QuarkOCP_MX_MoEMethod"))


def _auto_round(quantisation: Mapping[str, Any]) -> Scheme:
    if "mx" in str(quantisation.get("data_type", "")):
        return Scheme(format="AutoRound MXFP4", method="INCMxfp4MoEMethod")
    return replace(_GPTQ, format="AutoRound, loaded as GPTQ or AWQ")


def _deepseek_v4(quantisation: Mapping[str, Any], model: Mapping[str, Any]) -> Scheme:
    """vllm/models/deepseek_v4/quant_config.py."""
    if str(quantisation.get("moe_quant_algo") or "").upper() == "NVFP4":
        return _NVFP4
    return _FP8_IN_BLOCKS if model.get("expert_dtype", "fp4") == "fp8" else _MXFP4


def _modelopt_algorithms(quantisation: Mapping[str, Any]) -> Iterator[str]:
    """Of config.json, which holds them flat, or of hf_quant_config.json, under `quantization`."""
    held = quantisation.get("quantization")
    held = held if isinstance(held, Mapping) else quantisation
    algorithm = str(held.get("quant_algo") or quantisation.get("quant_method") or "").upper()
    layers = held.get("quantized_layers")
    if algorithm == "MIXED_PRECISION" and isinstance(layers, Mapping):
        experts = {key: value for key, value in layers.items() if "expert" in key} or layers
        for layer in experts.values():
            yield str(layer.get("quant_algo", "")).upper()
    else:
        yield algorithm


def _modelopt(algorithm: str) -> Scheme:
    if algorithm == "FP8":
        return Scheme(format="ModelOpt FP8", method="ModelOptFp8MoEMethod", kernels=_FP8_STATIC)
    if algorithm in ("NVFP4", "MODELOPT_FP4"):
        return _NVFP4
    if algorithm == "W4A16_NVFP4":
        return Scheme(
            format="ModelOpt NVFP4, weights alone",
            method="ModelOptNvFp4FusedMoE",
            kernels=_WEIGHTS_ALONE,
        )
    if algorithm == "MXFP8":
        return Scheme(format="ModelOpt MXFP8", method="ModelOptMxFp8FusedMoE")
    return _unknown(f"modelopt {algorithm}")


def _groups(quantisation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Each may be that of the experts: what a target matches depends on names of modules."""
    for group in (quantisation.get("config_groups") or {}).values():
        yield {"format": quantisation.get("format"), **group}


def _compressed(group: Mapping[str, Any]) -> Scheme:
    """As `CompressedTensorsMoEMethod.get_moe_method` decides."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    kind = (
        weights.get("type"),
        weights.get("num_bits"),
        inputs.get("type"),
        inputs.get("num_bits"),
    )
    name = f"compressed-tensors {kind[1]}-bit {kind[0]}"
    if kind[0] == "float" and kind[1] == 4:
        return _compressed_fp4(weights, weights_alone=not inputs, activations=kind[2:])
    if kind[:2] == ("float", 8) and weights.get("group_size") == 32:
        return Scheme(
            format="compressed-tensors MXFP8", method="CompressedTensorsW8A8Mxfp8MoEMethod"
        )
    if kind == ("float", 8, "float", 8):
        return _compressed_fp8(weights, inputs)
    if kind == ("int", 8, "int", 8):
        return Scheme(
            format="compressed-tensors INT8",
            method="CompressedTensorsW8A8Int8MoEMethod",
            kernels=_INT8,
        )
    if kind[0] == "int" and not inputs:
        return Scheme(
            format=f"compressed-tensors INT{kind[1]} weights (WNA16)",
            method="CompressedTensorsWNA16MoEMethod",
            kernels=_INT4,
        )
    if kind == ("int", 4, "float", 8):
        return Scheme(format=name, method="CompressedTensorsW4A8Fp8MoEMethod")
    if kind == ("int", 4, "int", 8):
        return Scheme(format=name, method="CompressedTensorsW4A8Int8MoEMethod")
    return _unknown(name)


def _compressed_fp8(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Scheme:
    strategy = weights.get("strategy")
    kernels, scale = {
        "block": (_FP8_BLOCK, "block"),
        "channel": (_FP8_ROW, "row"),
    }.get(str(strategy), (_FP8_TENSOR if inputs.get("dynamic") else _FP8_STATIC, "tensor"))
    return Scheme(
        format=f"compressed-tensors FP8, a scale per {scale}",
        method="CompressedTensorsW8A8Fp8MoEMethod",
        kernels=kernels,
    )


def _compressed_fp4(
    weights: Mapping[str, Any], *, weights_alone: bool, activations: tuple[Any, ...]
) -> Scheme:
    if weights.get("group_size") == 16:
        return Scheme(
            format="compressed-tensors NVFP4" + (", weights alone" if weights_alone else ""),
            method="CompressedTensorsW4A4Nvfp4MoEMethod",
            kernels=_WEIGHTS_ALONE if weights_alone else _FP4,
        )
    eight_bits = activations == ("float", 8)
    return Scheme(
        format="compressed-tensors MXFP4",
        method=f"CompressedTensorsW4{'A8' if eight_bits else 'A4'}Mxfp4MoEMethod",
    )
