"""Configurations of known models: of each, the settings of config.json that say what experts it has.

`tests/engines/test_checkpoints_as_served.py` holds our reader to vLLM's on each of them, and the table in
docs/checkpoints.md is made from them. Run as a program, it writes that table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marked_part import MarkedPart, table_row

from ep_rebalance.checkpoint import numbers_of, read_checkpoint, told_layers, weight_size
from ep_rebalance.engines.vllm.diagnosis import numbers_as_served

PART = MarkedPart(Path(__file__).parents[2] / "docs" / "checkpoints.md", "checkpoints")
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32},
        }
    },
}
_MXFP4 = {"quant_method": "mxfp4"}


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model.

    experts, top_k, moe_layers, layers: what its publisher says of it.
    config: the settings of config.json that count here.
    beside: hf_quant_config.json, if it has one.
    remote: whether only code that comes with the checkpoint makes transformers read it.
    unsaid: what vLLM's reader does not find in it, although it is there.
    """

    name: str
    experts: int
    top_k: int
    moe_layers: int
    layers: int
    config: Mapping[str, Any]
    beside: Mapping[str, Any] = field(default_factory=dict)
    remote: bool = False
    unsaid: Sequence[str] = ()

    def write(self, folder: Path) -> Path:
        """Its files, in a folder of its own."""
        made = folder / self.name
        made.mkdir(parents=True)
        (made / "config.json").write_text(json.dumps(self.config))
        if self.beside:
            (made / "hf_quant_config.json").write_text(json.dumps(self.beside))
        return made


def _known(
    name: str,
    numbers: tuple[int, int, int, int],
    model_type: str,
    architecture: str,
    *,
    beside: Mapping[str, Any] | None = None,
    remote: bool = False,
    unsaid: Sequence[str] = (),
    **settings: Any,
) -> Known:
    """numbers: experts, top-k, layers with experts, layers."""
    experts, top_k, moe_layers, layers = numbers
    return Known(
        name=name,
        experts=experts,
        top_k=top_k,
        moe_layers=moe_layers,
        layers=layers,
        config={"model_type": model_type, "architectures": [architecture], **settings},
        beside=beside or {},
        remote=remote,
        unsaid=unsaid,
    )


def _sizes(layers: int, hidden: int, width: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "moe_intermediate_size": width,
    }


def _dense_sizes(layers: int, hidden: int, width: int) -> dict[str, Any]:
    """Where the width of an expert has the name of that of a dense layer."""
    return {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": width}


def _routed(experts: int, top_k: int, first: int) -> dict[str, Any]:
    """DeepSeek's names."""
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "first_k_dense_replace": first,
    }


def _qwen(experts: int, top_k: int) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _local(experts: int, top_k: int) -> dict[str, Any]:
    """Mixtral's names."""
    return {"num_local_experts": experts, "num_experts_per_tok": top_k}


_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"

KNOWN: tuple[Known, ...] = (
    _known("Mixtral-8x7B", (8, 2, 32, 32), "mixtral", "MixtralForCausalLM",
           **_local(8, 2), **_dense_sizes(32, 4096, 14336), torch_dtype="bfloat16"),
    _known("Mixtral-8x22B", (8, 2, 56, 56), "mixtral", "MixtralForCausalLM",
           **_local(8, 2), **_dense_sizes(56, 6144, 16384)),
    _known("DeepSeek-V2", (160, 6, 59, 60), "deepseek_v2", "DeepseekV2ForCausalLM",
           **_routed(160, 6, 1), **_sizes(60, 5120, 1536), moe_layer_freq=1, kv_lora_rank=512),
    _known("DeepSeek-V2-Lite", (64, 6, 26, 27), "deepseek_v2", "DeepseekV2ForCausalLM",
           **_routed(64, 6, 1), **_sizes(27, 2048, 1408), moe_layer_freq=1, kv_lora_rank=512),
    _known("DeepSeek-V3", (256, 8, 58, 61), "deepseek_v3", "DeepseekV3ForCausalLM",
           **_routed(256, 8, 3), **_sizes(61, 7168, 2048), moe_layer_freq=1, n_group=8,
           quantization_config=_FP8),
    _known("DeepSeek-V3.2", (256, 8, 58, 61), "deepseek_v32", "DeepseekV32ForCausalLM",
           **_routed(256, 8, 3), **_sizes(61, 7168, 2048), moe_layer_freq=1,
           quantization_config=_FP8),
    _known("DeepSeek-R1-NVFP4", (256, 8, 58, 61), "deepseek_v3", "DeepseekV3ForCausalLM",
           **_routed(256, 8, 3), **_sizes(61, 7168, 2048), moe_layer_freq=1,
           beside={"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
    _known("DeepSeek-VL2", (72, 6, 29, 30), "deepseek_vl_v2", "DeepseekVLV2ForCausalLM",
           language_config={"model_type": "deepseek_v2", **_routed(72, 6, 1),
                            **_sizes(30, 2560, 1536), "moe_layer_freq": 1}),
    _known("Moonlight-16B-A3B", (64, 6, 26, 27), "deepseek_v3", "DeepseekV3ForCausalLM",
           **_routed(64, 6, 1), **_sizes(27, 2048, 1408), moe_layer_freq=1),
    _known("Kimi-K2", (384, 8, 60, 61), "kimi_k2", "DeepseekV3ForCausalLM",
           **_routed(384, 8, 1), **_sizes(61, 7168, 2048), moe_layer_freq=1,
           quantization_config=_FP8),
    _known("Kimi-K2-Thinking", (384, 8, 60, 61), "kimi_k2", "DeepseekV3ForCausalLM",
           **_routed(384, 8, 1), **_sizes(61, 7168, 2048), moe_layer_freq=1,
           quantization_config=_INT4),
    _known("Kimi-K2.5", (384, 8, 60, 61), "kimi_k25", "KimiK25ForConditionalGeneration",
           text_config={"model_type": "kimi_k2", **_routed(384, 8, 1), **_sizes(61, 7168, 2048),
                        "moe_layer_freq": 1, "quantization_config": _INT4}),
    _known("Kimi-VL-A3B", (64, 6, 26, 27), "kimi_vl", "KimiVLForConditionalGeneration",
           text_config={"model_type": "deepseek_v3", **_routed(64, 6, 1), **_sizes(27, 2048, 1408),
                        "moe_layer_freq": 1}),
    _known("Kimi-Linear-48B-A3B", (256, 8, 26, 27), "kimi_linear", "KimiLinearForCausalLM",
           num_experts=256, num_experts_per_token=8, first_k_dense_replace=1, moe_layer_freq=1,
           **_sizes(27, 2304, 1024)),
    _known("Qwen1.5-MoE-A2.7B", (60, 4, 24, 24), "qwen2_moe", "Qwen2MoeForCausalLM",
           **_qwen(60, 4), **_sizes(24, 2048, 1408)),
    _known("Qwen2-57B-A14B", (64, 8, 28, 28), "qwen2_moe", "Qwen2MoeForCausalLM",
           **_qwen(64, 8), **_sizes(28, 3584, 2560)),
    _known("Qwen3-30B-A3B", (128, 8, 48, 48), "qwen3_moe", "Qwen3MoeForCausalLM",
           **_qwen(128, 8), **_sizes(48, 2048, 768)),
    _known("Qwen3-30B-A3B-NVFP4", (128, 8, 48, 48), "qwen3_moe", "Qwen3MoeForCausalLM",
           **_qwen(128, 8), **_sizes(48, 2048, 768),
           beside={"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
    _known("Qwen3-235B-A22B-FP8", (128, 8, 94, 94), "qwen3_moe", "Qwen3MoeForCausalLM",
           **_qwen(128, 8), **_sizes(94, 4096, 1536), quantization_config=_FP8),
    _known("Qwen3-Coder-480B-A35B", (160, 8, 62, 62), "qwen3_moe", "Qwen3MoeForCausalLM",
           **_qwen(160, 8), **_sizes(62, 6144, 2560)),
    _known("Qwen3-Next-80B-A3B", (512, 10, 48, 48), "qwen3_next", "Qwen3NextForCausalLM",
           **_qwen(512, 10), **_sizes(48, 2048, 512)),
    _known("Qwen3-VL-30B-A3B", (128, 8, 48, 48), "qwen3_vl_moe",
           "Qwen3VLMoeForConditionalGeneration",
           text_config={"model_type": "qwen3_vl_moe_text", **_qwen(128, 8),
                        **_sizes(48, 2048, 768)}),
    _known("Qwen3-Omni-30B-A3B", (128, 8, 48, 48), "qwen3_omni_moe",
           "Qwen3OmniMoeForConditionalGeneration",
           thinker_config={"model_type": "qwen3_omni_moe_thinker",
                           "text_config": {"model_type": "qwen3_omni_moe_text", **_qwen(128, 8),
                                           **_sizes(48, 2048, 768)}}),
    _known("Qwen3.5-397B-A17B", (512, 10, 60, 60), "qwen3_5_moe",
           "Qwen3_5MoeForConditionalGeneration",
           text_config={"model_type": "qwen3_5_moe_text", "num_experts": 512,
                        "num_experts_per_tok": 10, **_sizes(60, 4096, 1024)}),
    _known("GLM-4.5", (160, 8, 89, 92), "glm4_moe", "Glm4MoeForCausalLM",
           **_routed(160, 8, 3), **_sizes(92, 5120, 1536)),
    _known("GLM-4.5-Air", (128, 8, 45, 46), "glm4_moe", "Glm4MoeForCausalLM",
           **_routed(128, 8, 1), **_sizes(46, 4096, 1408)),
    _known("GLM-4.5V", (128, 8, 45, 46), "glm4v_moe", "Glm4vMoeForConditionalGeneration",
           text_config={"model_type": "glm4v_moe_text", **_routed(128, 8, 1),
                        **_sizes(46, 4096, 1408)}),
    _known("GLM-4.7-Flash", (64, 4, 46, 47), "glm4_moe_lite", "Glm4MoeLiteForCausalLM",
           **_routed(64, 4, 1), **_sizes(47, 2048, 1536)),
    _known("GLM-5", (256, 8, 75, 78), "glm_moe_dsa", "GlmMoeDsaForCausalLM",
           **_routed(256, 8, 3), **_sizes(78, 6144, 2048), moe_layer_freq=1),
    _known("gpt-oss-20b", (32, 4, 24, 24), "gpt_oss", "GptOssForCausalLM",
           **_local(32, 4), experts_per_token=4, **_dense_sizes(24, 2880, 2880),
           quantization_config=_MXFP4),
    _known("gpt-oss-120b", (128, 4, 36, 36), "gpt_oss", "GptOssForCausalLM",
           **_local(128, 4), experts_per_token=4, **_dense_sizes(36, 2880, 2880),
           quantization_config=_MXFP4),
    _known("Llama-4-Scout", (16, 1, 48, 48), "llama4", "Llama4ForConditionalGeneration",
           text_config={"model_type": "llama4_text", **_local(16, 1),
                        **_dense_sizes(48, 5120, 8192), "interleave_moe_layer_step": 1}),
    _known("Llama-4-Maverick", (128, 1, 24, 48), "llama4", "Llama4ForConditionalGeneration",
           text_config={"model_type": "llama4_text", **_local(128, 1),
                        **_dense_sizes(48, 5120, 8192), "interleave_moe_layer_step": 2}),
    _known("MiniMax-Text-01", (32, 2, 80, 80), "minimax", "MiniMaxForCausalLM",
           **_local(32, 2), **_dense_sizes(80, 6144, 9216)),
    _known("MiniMax-M2", (256, 8, 62, 62), "minimax_m2", "MiniMaxM2ForCausalLM",
           **_local(256, 8), **_dense_sizes(62, 3072, 1536), quantization_config=_FP8),
    _known("Phi-3.5-MoE", (16, 2, 32, 32), "phimoe", "PhiMoEForCausalLM",
           **_local(16, 2), **_dense_sizes(32, 4096, 6400)),
    _known("OLMoE-1B-7B", (64, 8, 16, 16), "olmoe", "OlmoeForCausalLM",
           num_experts=64, num_experts_per_tok=8, **_dense_sizes(16, 2048, 1024)),
    _known("FlexOlmo-7x7B", (7, 5, 32, 32), "flex_olmo", "FlexOlmoForCausalLM",
           num_experts=7, num_experts_per_tok=5, **_dense_sizes(32, 4096, 11008)),
    _known("Granite-3.0-3B-A800M", (40, 8, 32, 32), "granitemoe", "GraniteMoeForCausalLM",
           **_local(40, 8), **_dense_sizes(32, 1536, 512)),
    _known("Granite-4.0-H-Small", (72, 10, 40, 40), "granitemoehybrid",
           "GraniteMoeHybridForCausalLM", **_local(72, 10), **_dense_sizes(40, 4096, 768)),
    _known("Jamba-1.5-Mini", (16, 2, 16, 32), "jamba", "JambaForCausalLM",
           num_experts=16, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
           **_dense_sizes(32, 4096, 14336)),
    _known("DBRX", (16, 4, 40, 40), "dbrx", "DbrxForCausalLM",
           n_layers=40, d_model=6144, n_heads=48, attn_config={"kv_n_heads": 8},
           ffn_config={"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752},
           unsaid=("experts", "top_k")),
    _known("ERNIE-4.5-21B-A3B", (64, 6, 27, 28), "ernie4_5_moe", "Ernie4_5_MoeForCausalLM",
           moe_num_experts=64, moe_k=6, moe_layer_start_index=1, moe_layer_end_index=-1,
           moe_layer_interval=1, **_sizes(28, 2560, 1536)),
    _known("ERNIE-4.5-300B-A47B", (64, 8, 51, 54), "ernie4_5_moe", "Ernie4_5_MoeForCausalLM",
           moe_num_experts=64, moe_k=8, moe_layer_start_index=3, moe_layer_end_index=53,
           moe_layer_interval=1, **_sizes(54, 8192, 3584)),
    _known("dots.llm1", (128, 6, 61, 62), "dots1", "Dots1ForCausalLM",
           **_routed(128, 6, 1), **_sizes(62, 4096, 1408)),
    _known("Hunyuan-A13B", (64, 8, 32, 32), "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM",
           num_experts=64, moe_topk=[8] * 32, **_dense_sizes(32, 4096, 3072),
           moe_intermediate_size=[3072] * 32),
    _known("Ling-flash-2.0", (256, 8, 31, 32), "bailing_moe", "BailingMoeV2ForCausalLM",
           num_experts=256, num_experts_per_tok=8, first_k_dense_replace=1,
           **_sizes(32, 4096, 1024), remote=True),
    _known("LongCat-Flash", (512, 12, 28, 28), "longcat_flash", "LongcatFlashForCausalLM",
           n_routed_experts=512, moe_topk=12, num_layers=28, hidden_size=6144,
           expert_ffn_hidden_size=2048, ffn_hidden_size=12288, zero_expert_num=256),
    _known("MiMo-V2-Flash", (256, 8, 47, 48), "mimo_v2_flash", "MiMoV2FlashForCausalLM",
           n_routed_experts=256, num_experts_per_tok=8, moe_layer_freq=[0] + [1] * 47,
           **_sizes(48, 4096, 2048)),
    _known("Step-3", (48, 3, 56, 61), "step3_vl", "Step3VLForConditionalGeneration",
           text_config={"model_type": "step3_text", "moe_num_experts": 48, "moe_top_k": 3,
                        "moe_layers_enum": ",".join(map(str, range(4, 60))),
                        **_sizes(61, 7168, 5120)}),
    _known("Step-3.5-Flash", (288, 8, 42, 45), "step3p5", "Step3p5ForCausalLM",
           moe_num_experts=288, moe_top_k=8, moe_layers_enum=",".join(map(str, range(3, 45))),
           **_sizes(45, 4096, 1280)),
    _known("Nemotron-3-Nano-30B-A3B", (128, 6, 23, 52), "nemotron_h", "NemotronHForCausalLM",
           n_routed_experts=128, num_experts_per_tok=6, hybrid_override_pattern=_NANO,
           **_sizes(52, 2688, 1856)),
    _known("Trinity-Mini", (128, 8, 30, 32), "afmoe", "AfmoeForCausalLM",
           num_experts=128, num_experts_per_tok=8, num_dense_layers=2, **_sizes(32, 2048, 1024)),
    _known("LFM2-8B-A1B", (32, 4, 22, 24), "lfm2_moe", "Lfm2MoeForCausalLM",
           num_experts=32, num_experts_per_tok=4, num_dense_layers=2, **_sizes(24, 2048, 1792)),
    _known("Gemma-4-26B-A4B", (128, 8, 30, 30), "gemma4", "Gemma4ForConditionalGeneration",
           text_config={"model_type": "gemma4_text", "num_experts": 128, "top_k_experts": 8,
                        "enable_moe_block": True, **_sizes(30, 2816, 704)}),
    _known("Aria", (64, 6, 28, 28), "aria", "AriaForConditionalGeneration",
           text_config={"model_type": "aria_text", "moe_num_experts": 64, "moe_topk": 6,
                        **_dense_sizes(28, 2560, 1664)}),
    _known("Intern-S1", (128, 8, 94, 94), "interns1", "InternS1ForConditionalGeneration",
           text_config={"model_type": "qwen3_moe", **_qwen(128, 8), **_sizes(94, 4096, 1536)},
           remote=True),
    _known("InternVL3.5-30B-A3B", (128, 8, 48, 48), "internvl_chat", "InternVLChatModel",
           llm_config={"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
                       **_qwen(128, 8), **_sizes(48, 2048, 768)}, remote=True),
    _known("K-EXAONE-236B-A23B", (128, 8, 47, 48), "exaone_moe", "ExaoneMoEForCausalLM",
           num_experts=128, num_experts_per_tok=8, first_k_dense_replace=1,
           mlp_layer_types=["dense"] + ["sparse"] * 47, **_sizes(48, 6144, 2048)),
    _known("Solar-Open-100B", (128, 8, 48, 48), "solar_open", "SolarOpenForCausalLM",
           **_routed(128, 8, 0), **_sizes(48, 4096, 1280)),
    _known("A.X-K1", (192, 8, 60, 61), "axk1", "AXK1ForCausalLM",
           **_routed(192, 8, 1), **_sizes(61, 7168, 2048), moe_layer_freq=1),
    _known("openPangu-Ultra-MoE-718B", (256, 8, 58, 61), "pangu_ultra_moe",
           "PanguUltraMoEForCausalLM",
           **_routed(256, 8, 3), **_sizes(61, 7680, 2048), remote=True),
    _known("Grok-1", (8, 2, 64, 64), "grok-1", "Grok1ModelForCausalLM",
           num_experts=8, num_experts_per_tok=2, **_dense_sizes(64, 6144, 32768), remote=True),
)  # fmt: skip
"""What others say in public of each; the settings that have no part in it are left out."""


def table(folder: Path) -> str:
    """The table in the document. folder: for the configurations."""
    rows = [
        table_row(("model", "model_type", "experts", "top-k", "which layers", "bytes", "vLLM")),
        table_row(["---"] * 7),
    ]
    return "\n".join([*rows, *(_row(known, folder) for known in KNOWN)]) + "\n"


def _row(known: Known, folder: Path) -> str:
    path = known.write(folder)
    checkpoint = read_checkpoint(str(path))
    ours = numbers_of(checkpoint.config)
    return table_row(
        (
            known.name,
            f"`{known.config['model_type']}`",
            str(ours.experts),
            str(ours.top_k),
            told_layers(ours.moe_layers, ours.layers),
            f"{weight_size(checkpoint).bytes_per_parameter:.3g}",
            verdict(known, path),
        )
    )


def verdict(known: Known, path: Path) -> str:
    """What vLLM's reader says beside ours."""
    ours = numbers_of(known.config)
    try:
        read = numbers_as_served(str(path))["numbers"]
    except Exception:  # transformers raises a dozen kinds
        return "cannot read it without the checkpoint's code"
    pairs = [(name, read[name], getattr(ours, name)) for name in ("experts", "top_k", "layers")]
    if all(theirs == own for _, theirs, own in pairs):
        return "the same"
    missing = [name for name, theirs, _ in pairs if not theirs]
    if all(theirs in (0, None, own) for _, theirs, own in pairs):
        return f"does not find {' and '.join(missing)}"
    return "; ".join(f"{name} {theirs}" for name, theirs, own in pairs if theirs != own)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        PART.write(table(Path(scratch)))
