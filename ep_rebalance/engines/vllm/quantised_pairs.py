"""Which quantised experts may move: vLLM's quantisation methods and expert kernels, by the names of their
classes.

What an expert consists of depends on both: the method loads its tensors, and the kernel chooses how they
are laid out and keeps more beside them. Each entry was read in vLLM 0.32 and 0.33
(vllm/model_executor/layers/quantization/, fused_moe/oracle/, fused_moe/experts/). The list does not replace
the trial at start: what is listed here is tried, too.

docs/quantisation.md shows the table; `pair_table` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from ep_rebalance.config import ConfigurationError, QuantisationConfig

Verdict = Literal["listed", "unlisted", "refused"]

ANY = "any"
"""In the place of a class: whatever the other one is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What is known of these quantisation methods with these kernels.

    format: in a user's words. methods, kernels: names of classes, or ANY.
    verdict: `listed` is known to be right by reading; `unlisted` is served only with
        `quantisation.unlisted: self_test`; `refused` cannot be right, or vLLM does not serve it so.
    reason: of the verdict, a clause.
    lifts_eplb_refusal: whether vLLM refuses to build the layer with its own balancer on although nothing
        of it speaks against moves (`supports_eplb`), and we have it built all the same.
    observable: whether mode=observe works, which moves nothing.
    """

    format: str
    methods: tuple[str, ...]
    kernels: tuple[str, ...]
    verdict: Verdict
    reason: str
    lifts_eplb_refusal: bool = False
    observable: bool = True

    @property
    def name(self) -> str:
        """As logs and refusals have it."""
        return f"{' or '.join(self.methods)} with {' or '.join(self.kernels)}"


_MONOLITHIC = (
    "FusedMoEExpertsMonolithic",
    "TrtLlmFp8ExpertsMonolithic",
    "TrtLlmNvFp4ExpertsMonolithic",
    "TrtLlmMxfp4ExpertsMonolithic",
    "TrtLlmMxint4ExpertsMonolithic",
    "OAITritonMxfp4ExpertsMonolithic",
    "AiterW4A16ExpertsMonolithic",
    "AiterW4A8ExpertsMonolithic",
    "AiterW4A4ExpertsMonolithic",
    "ZentorchExpertsInt4",
)
_WITHOUT_RANKS = (
    "B12xExperts",
    "FlashInferB12xExperts",
    "ArmCPUExpertsInt8",
    "PowerCPUExpertsInt8",
    "ZenCPUExpertsInt8",
)
_HUMMING = ("HummingIndexedExperts", "HummingGroupedExperts", "BatchedHummingGroupedExperts")
_AITER = (
    "AiterExperts",
    "AiterFp8BlockExperts",
    "AiterFp8ChannelExperts",
    "AiterFp8TensorExperts",
    "AiterMxfp4Experts",
    "AiterMxfp8Experts",
)
_XPU = (
    "XPUExpertsFp8",
    "XPUExpertsBlockFp8",
    "XPUExpertsMxFp8",
    "XPUExpertsMxFp4",
    "XPUExpertsWNA16",
)
_CPU = ("CPUExpertsFp8", "CPUExpertsFp8W8A8", "CPUExpertsInt4", "CPUExpertsInt8", "CPUExpertsMxfp4")

_PLAIN = "weights and scales lie one expert after another"
_SWAPPED = "gate and up change places within each expert; all scales lie one expert after another"
_REPACKED = "weights and scales are repacked expert by expert"
_GLOBAL_INT8 = (
    f"{_REPACKED}; with VLLM_MARLIN_INPUT_DTYPE=int8 a scale is that of a rank's own experts, and the "
    "comparison of ranks refuses it"
)
_TRTLLM = "weights and scales are shuffled expert by expert, and what is derived from them is, too"
_UNREAD_HUMMING = (
    "the Humming library, where it is installed, repacks the experts, and its layouts were not read"
)
_UNREAD_AITER = "the AITER library shuffles the experts and was not read; never tried on ROCm"
_UNREAD_XPU = "never tried on XPU"
_UNREAD_CPU = "compiled code packs the experts for the CPU, and its layout was not read"
_UNFOLLOWED = "its tensors were not followed from the checkpoint to the kernel"
_OWN_MAXIMUM = (
    "static scales of activations are the largest of a rank's own experts (quark_moe.py), and the "
    "comparison of ranks refuses those that differ"
)

_FP8 = "FP8, a scale per block (DeepSeek-V3, Qwen3-FP8) or per tensor"
_CT_FP8 = "compressed-tensors FP8"
_ONLINE_FP8 = "FP8 made from an unquantised checkpoint (--quantization fp8_...)"
_CT_INT8 = "compressed-tensors INT8"
_ONLINE_INT8 = "INT8 made from an unquantised checkpoint"
_WNA16 = "compressed-tensors INT4 or INT8 weights (WNA16, Kimi K2)"
_MODELOPT_FP8 = "ModelOpt FP8"
_NVFP4 = "ModelOpt NVFP4"
_CT_NVFP4 = "compressed-tensors NVFP4"
_MXFP4 = "MXFP4 (DeepSeek-V4)"
_CT_MXFP4 = "compressed-tensors MXFP4"
_AWQ = "AWQ"
_GPTQ = "GPTQ"


def _pair(
    verdict: Verdict,
    format: str,
    methods: Sequence[str],
    kernels: Sequence[str],
    reason: str,
    *,
    lifts: bool = False,
    observable: bool = True,
) -> Pair:
    return Pair(
        format=format,
        methods=tuple(methods),
        kernels=tuple(kernels),
        verdict=verdict,
        reason=reason,
        lifts_eplb_refusal=lifts,
        observable=observable,
    )


_listed = partial(_pair, "listed")
_unlisted = partial(_pair, "unlisted")
_refused = partial(_pair, "refused")

_PER_ROW_ONLINE = ("Fp8PtpcOnlineMoEMethod",)
_OTHER_ONLINE = ("Fp8PerTensorOnlineMoEMethod", "Fp8PerBlockOnlineMoEMethod")
_FP8_PLAIN = (
    "TritonExperts",
    "BatchedTritonExperts",
    "TritonOrDeepGemmExperts",
    "DeepGemmExperts",
    "BatchedDeepGemmExperts",
)
_FP8_CUTLASS = ("TritonOrCutlassExperts", "CutlassExpertsFp8", "CutlassBatchedExpertsFp8")
_BESIDE = f"{_PLAIN}; the strides beside them are equal for all experts"
_FOLDED = (
    "weights and scales lie one expert after another, the scales of activations folded into them; one "
    "common scale is the largest of all ranks'"
)
_PER_EXPERT_GSCALE = (
    "each expert has a scale of activations of its own, which lies in the kernel's settings and moves "
    "along"
)
_MARLIN_FACTOR = (
    f"{_REPACKED}; a factor of the rank lies in two scales that cancel out, and both move"
)
_MXFP4_TRITON = (
    "weights and scales lie in objects of triton_kernels, whose strides differ by version and were not "
    "followed"
)

PAIRS: tuple[Pair, ...] = (
    # Whatever the format is.
    _refused(
        "all formats",
        [ANY],
        _MONOLITHIC,
        "the kernel routes tokens by itself, so nothing can be counted",
        observable=False,
    ),
    _refused(
        "all formats",
        [ANY],
        _WITHOUT_RANKS,
        "vLLM has no expert parallelism with this kernel",
        observable=False,
    ),
    _refused(
        "all formats",
        [ANY],
        ["Nvfp4QuantizationEmulationTritonExperts"],
        "its scale of activations is the largest of the rank's own experts (oracle/nvfp4.py)",
    ),
    _refused(
        "all formats",
        [ANY],
        ["TrtLlmFp8ExpertsModular", "TrtLlmMxfp4LoRAExperts", "MoonEPExperts"],
        "vLLM does not choose this kernel where experts are to move",
    ),
    _unlisted(
        "all formats",
        [ANY],
        ["FlashInferMoeEpExperts"],
        "FlashInfer's kernel keeps what it makes of the weights to itself",
    ),
    _unlisted("all formats", [ANY], _HUMMING, _UNREAD_HUMMING),
    _unlisted("all formats", [ANY], _AITER, _UNREAD_AITER),
    _unlisted("all formats", [ANY], _XPU, _UNREAD_XPU),
    _unlisted("all formats", [ANY], _CPU, _UNREAD_CPU),
    _listed("unquantised", ["UnquantizedFusedMoEMethod"], [ANY], "an expert is its weights"),
    # FP8
    _listed(_FP8, ["Fp8MoEMethod"], _FP8_PLAIN, _PLAIN),
    _listed(_FP8, ["Fp8MoEMethod"], ["FlashInferExperts"], _SWAPPED),
    _listed(_FP8, ["Fp8MoEMethod"], ["MarlinExperts"], _REPACKED),
    _listed(_FP8, ["Fp8MoEMethod"], ["HPCExperts"], _PLAIN),
    _listed(_CT_FP8, ["CompressedTensorsW8A8Fp8MoEMethod"], _FP8_PLAIN, _PLAIN),
    _listed(_CT_FP8, ["CompressedTensorsW8A8Fp8MoEMethod"], _FP8_CUTLASS, _BESIDE),
    _listed(_CT_FP8, ["CompressedTensorsW8A8Fp8MoEMethod"], ["FlashInferExperts"], _SWAPPED),
    _listed(_CT_FP8, ["CompressedTensorsW8A8Fp8MoEMethod"], ["MarlinExperts"], _REPACKED),
    _listed(_CT_FP8, ["CompressedTensorsW8A8Fp8MoEMethod"], ["HPCExperts"], _PLAIN),
    _listed(_ONLINE_FP8, _PER_ROW_ONLINE + _OTHER_ONLINE, _FP8_PLAIN, _PLAIN),
    _listed(_ONLINE_FP8, _PER_ROW_ONLINE, _FP8_CUTLASS, _BESIDE),
    _listed(_ONLINE_FP8, _OTHER_ONLINE, ["FlashInferExperts"], _SWAPPED),
    _listed(_ONLINE_FP8, _OTHER_ONLINE, ["MarlinExperts"], _REPACKED),
    _listed(
        _MODELOPT_FP8,
        ["ModelOptFp8MoEMethod"],
        ["TritonExperts", "BatchedTritonExperts", "HPCExperts"],
        _PLAIN,
        lifts=True,
    ),
    _listed(_MODELOPT_FP8, ["ModelOptFp8MoEMethod"], ["FlashInferExperts"], _SWAPPED, lifts=True),
    _listed(_MODELOPT_FP8, ["ModelOptFp8MoEMethod"], ["MarlinExperts"], _REPACKED, lifts=True),
    _unlisted("Quark FP8", ["QuarkW8A8Fp8MoEMethod"], [ANY], _OWN_MAXIMUM),
    # INT8, INT4
    _listed(
        _CT_INT8, ["CompressedTensorsW8A8Int8MoEMethod"], ["TritonExperts"], _PLAIN, lifts=True
    ),
    _listed(_ONLINE_INT8, ["Int8OnlineMoEMethod"], ["TritonExperts"], _PLAIN),
    _unlisted("Quark INT8", ["QuarkW8A8Int8MoEMethod"], [ANY], _OWN_MAXIMUM),
    _listed(
        _WNA16,
        ["CompressedTensorsWNA16MoEMethod"],
        ["MarlinExperts", "BatchedMarlinExperts"],
        _GLOBAL_INT8,
        lifts=True,
    ),
    _listed(_WNA16, ["CompressedTensorsWNA16MoEMethod"], ["TritonWNA16Experts"], _PLAIN),
    _unlisted(
        _WNA16,
        ["CompressedTensorsWNA16MoEMethod"],
        ["Int4EmulationTritonExperts", "Rdna3WNA16Experts"],
        _UNFOLLOWED,
    ),
    _listed(
        _AWQ,
        ["AutoAWQMoEMethod"],
        ["MarlinExperts", "BatchedMarlinExperts"],
        f"{_REPACKED}, zero points too",
        lifts=True,
    ),
    _listed(
        _GPTQ,
        ["AutoGPTQMoEMethod"],
        ["MarlinExperts", "BatchedMarlinExperts"],
        _GLOBAL_INT8,
        lifts=True,
    ),
    _unlisted(
        f"{_AWQ}, {_GPTQ}",
        ["AutoAWQMoEMethod", "AutoGPTQMoEMethod"],
        ["TritonWNA16Experts", "Int4EmulationTritonExperts"],
        _UNFOLLOWED,
    ),
    _unlisted(
        f"{_AWQ}, {_GPTQ}, where Marlin does not fit (moe_wna16)",
        ["MoeWNA16Method", "INCARKWNA16MoEMethod"],
        [ANY],
        "its loader puts zero points where the expert's number in the model says, not that within the rank",
    ),
    _unlisted(
        "compressed-tensors INT4 weights, FP8 activations",
        ["CompressedTensorsW4A8Fp8MoEMethod"],
        [ANY],
        "vLLM leaves it out of its balancer, and the packed strides beside the weights were not followed",
    ),
    _refused(
        "compressed-tensors INT4 weights, INT8 activations",
        ["CompressedTensorsW4A8Int8MoEMethod"],
        [ANY],
        "vLLM has it on CPUs only, by a kernel without expert parallelism",
        observable=False,
    ),
    _unlisted(
        "compressed-tensors INT4 by FlyDSL",
        ["CompressedTensorsW4A16FlydslMoEMethod"],
        [ANY],
        _UNREAD_AITER,
    ),
    # FP4
    _listed(
        _NVFP4,
        ["ModelOptNvFp4FusedMoE"],
        ["TrtLlmNvFp4ExpertsModular"],
        f"{_TRTLLM}; one common scale is the largest of all ranks'",
    ),
    _listed(
        _NVFP4,
        ["ModelOptNvFp4FusedMoE"],
        ["FlashInferExperts", "FlashInferCuteDSLExperts", "FlashInferCuteDSLBatchedExperts"],
        _FOLDED,
    ),
    _listed(_NVFP4, ["ModelOptNvFp4FusedMoE"], ["CutlassExpertsFp4"], _PER_EXPERT_GSCALE),
    _listed(_NVFP4, ["ModelOptNvFp4FusedMoE"], ["MarlinExperts"], _MARLIN_FACTOR),
    _listed(
        _CT_NVFP4,
        ["CompressedTensorsW4A4Nvfp4MoEMethod"],
        ["TrtLlmNvFp4ExpertsModular"],
        f"{_TRTLLM}; one common scale is the largest of all ranks'",
    ),
    _listed(
        _CT_NVFP4,
        ["CompressedTensorsW4A4Nvfp4MoEMethod"],
        ["FlashInferCuteDSLExperts", "FlashInferCuteDSLBatchedExperts"],
        _FOLDED,
    ),
    _listed(
        _CT_NVFP4,
        ["CompressedTensorsW4A4Nvfp4MoEMethod"],
        ["FlashInferExperts"],
        _FOLDED,
        lifts=True,
    ),
    _listed(
        _CT_NVFP4,
        ["CompressedTensorsW4A4Nvfp4MoEMethod"],
        ["CutlassExpertsFp4"],
        _PER_EXPERT_GSCALE,
        lifts=True,
    ),
    _listed(
        _CT_NVFP4,
        ["CompressedTensorsW4A4Nvfp4MoEMethod"],
        ["MarlinExperts"],
        _MARLIN_FACTOR,
        lifts=True,
    ),
    _unlisted(
        "NVFP4 made from an unquantised checkpoint", ["Nvfp4OnlineMoEMethod"], [ANY], _UNFOLLOWED
    ),
    _unlisted("Quark NVFP4", ["QuarkNvfp4MoEMethod"], [ANY], _UNFOLLOWED),
    _listed(
        _MXFP4,
        ["Mxfp4MoEMethod"],
        ["TrtLlmMxfp4ExpertsModular"],
        "weights and scales are shuffled expert by expert",
    ),
    _listed(
        _MXFP4,
        ["Mxfp4MoEMethod"],
        ["DeepGemmFP4Experts"],
        "weights stay as they are, and scales are laid out in columns, expert by expert",
    ),
    _listed(_MXFP4, ["Mxfp4MoEMethod"], ["MarlinExperts", "BatchedMarlinExperts"], _REPACKED),
    _unlisted(
        _MXFP4, ["Mxfp4MoEMethod"], ["OAITritonExperts", "UnfusedOAITritonExperts"], _MXFP4_TRITON
    ),
    _unlisted(
        _MXFP4,
        ["Mxfp4MoEMethod"],
        [
            "FlashInferExperts",
            "CutlassExpertsMxfp4",
            "OCP_MXQuantizationEmulationTritonExperts",
        ],
        _UNFOLLOWED,
    ),
    _refused(
        "MXFP4 of gpt-oss",
        ["GptOssMxfp4MoEMethod"],
        [ANY],
        "vLLM's gpt-oss does not say which of its layers hold experts (models/gpt_oss.py)",
        observable=False,
    ),
    _unlisted(
        _CT_MXFP4,
        ["CompressedTensorsW4A4Mxfp4MoEMethod", "CompressedTensorsW4A8Mxfp4MoEMethod"],
        [ANY],
        _UNFOLLOWED,
    ),
    _unlisted(
        "MXFP4 made from an unquantised checkpoint", ["Mxfp4OnlineMoEMethod"], [ANY], _UNFOLLOWED
    ),
    # The rest
    _unlisted(
        "MXFP8",
        [
            "ModelOptMxFp8FusedMoE",
            "CompressedTensorsW8A8Mxfp8MoEMethod",
            "Mxfp8OnlineMoEMethod",
            "INCMxfp8MoEMethod",
            "QuarkW8A8Mxfp8MoEMethod",
        ],
        [ANY],
        "how each kernel lays out its scales was not followed",
    ),
    _unlisted(
        "Quark INT4, INT4-FP8 and OCP MX",
        ["QuarkW4A16Int4MoEMethod", "QuarkW4A8Fp8MoEMethod", "QuarkOCP_MX_MoEMethod"],
        [ANY],
        _UNFOLLOWED,
    ),
    _unlisted("AutoRound MXFP4 (INC)", ["INCMxfp4MoEMethod"], [ANY], _UNFOLLOWED),
    _unlisted("any, with --quantization humming", ["HummingMoEMethod"], [ANY], _UNREAD_HUMMING),
    _refused(
        "ModelOpt blocks of 2 bits",
        ["ModelOptBlockQuantMoEMethod"],
        [ANY],
        "vLLM has no expert parallelism with it",
        observable=False,
    ),
)

MOE_BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "TritonExperts": "triton",
        "TritonWNA16Experts": "triton",
        "TritonOrDeepGemmExperts": "deep_gemm",
        "DeepGemmFP4Experts": "deep_gemm",
        "TritonOrCutlassExperts": "cutlass",
        "CutlassExpertsFp4": "cutlass",
        "FlashInferExperts": "flashinfer_cutlass",
        "FlashInferCuteDSLExperts": "flashinfer_cutedsl",
        "TrtLlmNvFp4ExpertsModular": "flashinfer_trtllm",
        "TrtLlmMxfp4ExpertsModular": "flashinfer_trtllm",
        "MarlinExperts": "marlin",
        "HPCExperts": "hpc",
    }
)
"""What `--moe-backend` calls a kernel that can be asked for, by its class."""


def pair_of(method_class: str, kernel_class: str) -> Pair:
    """What is known of a quantisation method with a kernel, both by the name of a class."""
    return _find([method_class], [kernel_class])


def pair_of_layer(method: Any) -> Pair:
    """What is known of a layer's quantisation method with the kernel that it has, or will have.

    method: vLLM's FusedMoEMethodBase. A class that is not in the table is taken for its nearest base.
    """
    owner = getattr(method, "old_quant_method", method)
    return _find(_names(type(owner)), _names(kernel_class(method)))


def kernel_class(method: Any) -> type | None:
    """Of the experts; chosen with the method, and made when its weights are loaded."""
    kernel = getattr(method, "moe_kernel", None)
    if kernel is not None:
        return type(kernel.fused_experts)
    owner = getattr(method, "old_quant_method", method)
    chosen: type | None = getattr(owner, "experts_cls", None)
    return chosen


def pairs_of_method(method_class: str) -> tuple[Pair, ...]:
    """All entries that name it."""
    return tuple(pair for pair in PAIRS if method_class in pair.methods)


def refuse_pair(pair: Pair, quantisation: QuantisationConfig, where: str) -> None:
    """Raises ConfigurationError if it may not move.

    where: whose experts they are, such as a layer.
    """
    if pair.verdict == "refused":
        raise ConfigurationError(
            f"the experts of {where} cannot move ({pair.name}): {pair.reason}.",
            f"{_other_kernel(pair)}{_served_without_moves(pair)}",
        )
    if pair.verdict == "unlisted" and quantisation.unlisted == "refuse":
        raise ConfigurationError(
            f"the experts of {where} are not on the list of those that may move ({pair.name}): "
            f"{pair.reason}.",
            f"{_other_kernel(pair)}set quantisation.unlisted=self_test to serve them if a trial at start "
            f"passes, or {_served_without_moves(pair)}",
        )


def listed_backends(method_class: str) -> list[str]:
    """What `--moe-backend` may name with it, some of which this machine may not have."""
    kernels = [
        kernel
        for pair in pairs_of_method(method_class)
        if pair.verdict == "listed"
        for kernel in pair.kernels
    ]
    return sorted({MOE_BACKENDS[kernel] for kernel in kernels if kernel in MOE_BACKENDS})


def _other_kernel(pair: Pair) -> str:
    backends = listed_backends(pair.methods[0])
    return (
        f"choose a listed kernel with --moe-backend {' or '.join(backends)}, " if backends else ""
    )


def _served_without_moves(pair: Pair) -> str:
    if pair.observable:
        return "use mode=observe, which moves nothing."
    return "serve it without --plugin ep_rebalance."


def pair_table() -> str:
    """The table as Markdown."""
    rows = ["| format | method | kernel | verdict | reason |", "|---|---|---|---|---|"]
    rows += [
        f"| {pair.format} | {_code(pair.methods)} | {_code(pair.kernels)} | {pair.verdict} | "
        f"{pair.reason} |"
        for pair in PAIRS
    ]
    return "\n".join(rows)


def _code(names: Iterable[str]) -> str:
    return ", ".join(ANY if name == ANY else f"`{name}`{_backend(name)}" for name in names)


def _backend(kernel: str) -> str:
    return f" ({MOE_BACKENDS[kernel]})" if kernel in MOE_BACKENDS else ""


def _by_names() -> Iterator[tuple[tuple[str, str], Pair]]:
    for pair in PAIRS:
        for method in pair.methods:
            for kernel in pair.kernels:
                yield (method, kernel), pair


_TABLE: Mapping[tuple[str, str], Pair] = MappingProxyType(dict(_by_names()))


def _find(methods: Sequence[str], kernels: Sequence[str]) -> Pair:
    """The nearest entry of these classes and their bases, but a refusal first."""
    keys = [
        *((method, kernel) for method in methods for kernel in kernels),
        *((method, ANY) for method in methods),
        *((ANY, kernel) for kernel in kernels),
    ]
    found = [_TABLE[key] for key in keys if key in _TABLE]
    found.sort(key=lambda pair: pair.verdict != "refused")
    asked = tuple(methods[:1]), tuple(kernels[:1]) or ("no kernel",)
    if not found:
        return _unlisted("unknown", *asked, "never read")
    return replace(found[0], methods=asked[0], kernels=asked[1])


def _names(cls: type | None) -> list[str]:
    return [] if cls is None else [base.__name__ for base in cls.__mro__]
