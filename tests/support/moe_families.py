"""The families of Mixture-of-Experts models that tests and `scripts/make_moe_checkpoint` make small ones of.

Each has what sets its family apart: dense layers first or between, shared experts, grouped or biased routing,
latent attention, layers without attention. Sizes are the least that vLLM's kernels for CPU take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, HEADS, VOCABULARY = 4, 8, 2, 128, 64, 4, 320
POSITIONS = 512
RELEASES = ("0.32", "0.33, V1 runner")
"""Names of the engines in the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family.

    model_type: of transformers' configuration.
    examples: released models of it.
    settings: of the configuration, in its own words, beside those that all have.
    moe_layers: numbers of the layers with experts, as the model counts its layers.
    top_k: experts per token, zero-compute ones included.
    architecture: of released checkpoints, where transformers has another name for its class.
    embedding_scale: by which the model multiplies its embeddings.
    tensors: of its checkpoints, by name and with their shapes, where transformers has no class for it.
    experts: of a layer, as `settings` have them.
    zero_experts: those that compute nothing and have no weights.
    layers: all that have numbers, those without experts too.
    ungrouped_sigmoid: whether it routes as vLLM's router for CPU does only with the plugin of that name.
    limits: by release of vLLM, a pattern of the error with which it ends on CPU, with this package or
        without.
    parallel_limits: the same of expert parallelism, which vLLM's own configuration refuses.
    dtype: to serve it in. With float32, answers hang less on the order of sums.
    """

    name: str
    model_type: str
    examples: str
    settings: Mapping[str, Any]
    moe_layers: tuple[int, ...] = tuple(range(LAYERS))
    top_k: int = TOP_K
    architecture: str = ""
    embedding_scale: float = 1.0
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: int = EXPERTS
    zero_experts: int = 0
    ungrouped_sigmoid: bool = False
    dtype: str = "float32"
    layers: int = LAYERS
    limits: Mapping[str, str] = field(default_factory=dict)
    parallel_limits: Mapping[str, str] = field(default_factory=dict)


_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
    "num_key_value_heads": HEADS,
}
"""Multi-head latent attention, with the only sizes that vLLM's kernel for CPU takes."""
_GROUPED = {"n_group": 4, "topk_group": 2}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_ROUTED_EXPERTS = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": INNER,
}
_DEEPSEEK = {
    **_ROUTED_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_AFTER_FIRST = tuple(range(1, LAYERS))
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    "shared_expert_intermediate_size": INNER,
}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER}
_LOCAL_EXPERTS = {
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "intermediate_size": INNER,
}
_SPARSE_AFTER_FIRST = ["dense", *["sparse"] * (LAYERS - 1)]
_WITHOUT_TORCHVISION = dict.fromkeys(RELEASES, "failed to be inspected|torchvision")
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}


def _step_tensors(moe_layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """As Step-3.5-Flash's checkpoint has them."""
    grouped = HIDDEN // 2  # two heads of keys, and of values
    matrices = {"q": (HIDDEN, HIDDEN), "k": (grouped, HIDDEN), "v": (grouped, HIDDEN)}
    attention = {f"{name}_proj.weight": shape for name, shape in matrices.items()}
    attention |= {"o_proj.weight": (HIDDEN, HIDDEN), "q_norm.weight": (32,), "k_norm.weight": (32,)}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        sparse, layer = number in moe_layers, f"model.layers.{number}"
        tensors |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        tensors |= {
            f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")
        }
        tensors |= _gated(
            f"{layer}.share_expert" if sparse else f"{layer}.mlp", INNER if sparse else 2 * INNER
        )
        if sparse:
            tensors |= _gated(f"{layer}.moe", INNER, EXPERTS)
            tensors |= {
                f"{layer}.moe.gate.weight": (EXPERTS, HIDDEN),
                f"{layer}.moe.router_bias": (EXPERTS,),
            }
    return tensors | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _gated(name: str, inner: int, *experts: int) -> dict[str, tuple[int, ...]]:
    """A gated perceptron, or all experts' in one."""
    into, out = (*experts, inner, HIDDEN), (*experts, HIDDEN, inner)
    shapes = {"gate_proj": into, "up_proj": into, "down_proj": out}
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()}


FAMILIES = (
    Family(
        name="mixtral",
        model_type="mixtral",
        examples="Mixtral 8x7B, 8x22B",
        settings=_LOCAL_EXPERTS,
    ),
    Family(
        name="qwen2_moe",
        model_type="qwen2_moe",
        examples="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        settings={**_EXPERTS, "shared_expert_intermediate_size": INNER, "mlp_only_layers": [1]},
        moe_layers=(0, 2, 3),
    ),
    Family(
        name="qwen3_moe",
        model_type="qwen3_moe",
        examples="Qwen3-30B-A3B, Qwen3-235B-A22B",
        settings={**_EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": []},
        moe_layers=(1, 3),
    ),
    Family(
        name="qwen3_next",
        model_type="qwen3_next",
        examples="Qwen3-Next-80B-A3B",
        settings={**_EXPERTS, **_LINEAR},
        dtype="bfloat16",
    ),
    Family(
        name="qwen3_5_moe",
        model_type="qwen3_5_moe_text",
        examples="Qwen3.5-35B-A3B, Qwen3.5-397B-A17B",
        settings={**_EXPERTS, **_LINEAR},
        dtype="bfloat16",
        limits={} if find_spec("torchvision") else _WITHOUT_TORCHVISION,
    ),
    Family(
        name="deepseek_v2",
        model_type="deepseek_v2",
        examples="DeepSeek-V2, V2.5, Coder-V2",
        settings={**_DEEPSEEK, **_LATENT, **_GROUPED, "topk_method": "group_limited_greedy"},
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="deepseek_v3",
        model_type="deepseek_v3",
        examples="DeepSeek-V3, R1, V3.1",
        settings={
            **_DEEPSEEK,
            **_LATENT,
            **_GROUPED,
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="glm4_moe",
        model_type="glm4_moe",
        examples="GLM-4.5, GLM-4.5-Air, GLM-4.6",
        settings={
            **_DEEPSEEK,
            "head_dim": 32,
            **_ONE_GROUP,
            "num_nextn_predict_layers": 0,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="glm4_moe_lite",
        model_type="glm4_moe_lite",
        examples="GLM-4.7-Flash",
        settings={
            **_DEEPSEEK,
            **_LATENT,
            "mlp_layer_types": _SPARSE_AFTER_FIRST,
            "num_nextn_predict_layers": 0,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="olmoe",
        model_type="olmoe",
        examples="OLMoE-1B-7B",
        settings={**_EXPERTS, "intermediate_size": INNER},
    ),
    Family(
        name="granitemoe",
        model_type="granitemoe",
        examples="Granite 3.0 1B-A400M, 3B-A800M",
        settings={
            **_LOCAL_EXPERTS,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
        },
    ),
    Family(
        name="granitemoeshared",
        model_type="granitemoeshared",
        examples="Granite MoE with shared experts",
        settings={**_LOCAL_EXPERTS, "shared_intermediate_size": INNER},
    ),
    Family(
        name="granitemoehybrid",
        model_type="granitemoehybrid",
        examples="Granite 4.0 H-Tiny, H-Small",
        settings={
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": INNER,
            "layer_types": ["mamba", "attention"] * (LAYERS // 2),
            "mamba_n_heads": 4,
            "mamba_d_head": 64,
            "mamba_d_state": 16,
            "mamba_n_groups": 2,
        },
    ),
    Family(
        name="ernie4_5_moe",
        model_type="ernie4_5_moe",
        examples="ERNIE-4.5-21B-A3B, 300B-A47B",
        settings={
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": INNER,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": LAYERS - 1,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="minimax_m2",
        model_type="minimax_m2",
        examples="MiniMax-M2, M2.1",
        settings={
            **_LOCAL_EXPERTS,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
        ungrouped_sigmoid=True,
    ),
    Family(
        name="phimoe",
        model_type="phimoe",
        examples="Phi-3.5-MoE, Phi-tiny-MoE",
        settings={
            **_LOCAL_EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
        },
        architecture="PhiMoEForCausalLM",
    ),
    Family(
        name="llama4",
        model_type="llama4_text",
        examples="Llama 4 Scout, Maverick",
        settings={
            **_LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 2 * INNER,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": POSITIONS,
        },
        moe_layers=(1, 3),
        top_k=1,
    ),
    Family(
        name="gpt_oss",
        model_type="gpt_oss",
        examples="gpt-oss-20b, gpt-oss-120b",
        settings={
            **_LOCAL_EXPERTS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": POSITIONS // 2,
            },
        },
    ),
    Family(
        name="jamba",
        model_type="jamba",
        examples="Jamba 1.5 Mini, Large",
        settings={
            **_EXPERTS,
            "intermediate_size": INNER,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 8,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
        moe_layers=(1, 3),
        limits=dict.fromkeys(RELEASES, "no attribute .selective_scan_fwd"),
    ),
    Family(
        name="nemotron_h",
        model_type="nemotron_h",
        examples="Nemotron 3 Nano 30B-A3B",
        settings={
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            **_ROUTED_EXPERTS,
            "moe_shared_expert_intermediate_size": INNER,
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "ssm_state_size": 16,
            "n_groups": 2,
            "head_dim": 32,
        },
        moe_layers=(1, 3),
        limits=dict.fromkeys(RELEASES, "is_act_and_mul=False is supported only for"),
    ),
    Family(
        name="hunyuan_v1_moe",
        model_type="hunyuan_v1_moe",
        examples="Hunyuan-A13B",
        settings={
            "num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "intermediate_size": INNER,
            "head_dim": 32,
        },
    ),
    Family(
        name="dots1",
        model_type="dots1",
        examples="dots.llm1",
        settings={**_DEEPSEEK, **_ONE_GROUP},
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="longcat_flash",
        model_type="longcat_flash",
        examples="LongCat-Flash-Chat",
        settings={
            **{name: value for name, value in _LATENT.items() if name != "head_dim"},
            "num_layers": 2,
            "num_hidden_layers": 4,
            "n_routed_experts": EXPERTS,
            "moe_topk": 3,
            "zero_expert_num": 4,
            "zero_expert_type": "identity",
            "expert_ffn_hidden_size": INNER,
            "ffn_hidden_size": 2 * INNER,
            "routed_scaling_factor": 1.5,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
        layers=2,
        moe_layers=(0, 1),
        top_k=3,
        zero_experts=4,
        limits=dict.fromkeys(RELEASES, "no attribute .topk_softmax"),
    ),
    Family(
        name="afmoe",
        model_type="afmoe",
        examples="Trinity Mini",
        settings={
            **_EXPERTS,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            **_SLIDING,
            **_ONE_GROUP,
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.5,
            "head_dim": 32,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="exaone_moe",
        model_type="exaone_moe",
        examples="K-EXAONE-236B-A23B",
        settings={
            **_EXPERTS,
            "first_k_dense_replace": 1,
            "mlp_layer_types": _SPARSE_AFTER_FIRST,
            "num_shared_experts": 1,
            "head_dim": 32,
            **_ONE_GROUP,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="lfm2_moe",
        model_type="lfm2_moe",
        examples="LFM2-8B-A1B",
        settings={
            **_EXPERTS,
            "num_dense_layers": 1,
            "tie_embedding": True,
            "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="gemma4",
        model_type="gemma4_text",
        examples="Gemma 4 26B-A4B",
        settings={
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": INNER,
            "head_dim": 32,
            "global_head_dim": 32,
            **_SLIDING,
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": True,
        },
        embedding_scale=HIDDEN**0.5,
    ),
    Family(
        name="hy_v3",
        model_type="hy_v3",
        examples="Hy3-preview",
        settings={
            **_EXPERTS,
            "num_shared_experts": 1,
            "mlp_layer_types": _SPARSE_AFTER_FIRST,
            "first_k_dense_replace": 1,
            "expert_hidden_dim": INNER,
            "qk_norm": True,
            "route_norm": True,
            "head_dim": 32,
        },
        moe_layers=_AFTER_FIRST,
    ),
    Family(
        name="laguna",
        model_type="laguna",
        examples="Laguna XS.2",
        settings={
            **_EXPERTS,
            "shared_expert_intermediate_size": INNER,
            "head_dim": 32,
            "num_attention_heads_per_layer": [HEADS] * LAYERS,
            "mlp_layer_types": _SPARSE_AFTER_FIRST,
        },
        moe_layers=_AFTER_FIRST,
        ungrouped_sigmoid=True,
    ),
    Family(
        name="cohere2_moe",
        model_type="cohere2_moe",
        examples="Command A+ (05-2026)",
        settings={
            **_EXPERTS,
            "intermediate_size": INNER,
            "head_dim": 32,
            **_SLIDING,
            "mlp_layer_types": ["sparse"] * LAYERS,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        name="flex_olmo",
        model_type="flex_olmo",
        examples="FlexOlmo-7x7B",
        settings={**_EXPERTS, "intermediate_size": INNER},
    ),
    Family(
        name="dbrx",
        model_type="dbrx",
        examples="DBRX",
        parallel_limits=dict.fromkeys(
            RELEASES, "Number of experts in the model must be greater|vLLM finds no"
        ),
        settings={
            "d_model": HIDDEN,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "max_seq_len": POSITIONS,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": INNER,
                "moe_num_experts": EXPERTS,
                "moe_top_k": TOP_K,
            },
        },
    ),
    Family(
        name="step3p5",
        model_type="step3p5",
        examples="Step-3.5-Flash",
        settings={
            "num_attention_groups": 2,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
            "moe_intermediate_size": INNER,
            "share_expert_dim": INNER,
            "moe_layers_enum": "1,2,3",
            "moe_router_activation": "sigmoid",
            "sliding_window": POSITIONS,
            "head_dim": 32,
            **_SLIDING,
        },
        moe_layers=_AFTER_FIRST,
        architecture="Step3p5ForCausalLM",
        tensors=_step_tensors(_AFTER_FIRST),
        ungrouped_sigmoid=True,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
