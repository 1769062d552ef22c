"""A model of vLLM's own classes: its layers are counted, and its experts moved.

Every second layer of this one has experts, and vLLM's `num_moe_layers` counts all but the first.
"""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from balanced_engine import EAGER
from ranks import Ranks
from vllm_groups import IMPORT_SECONDS, join

EXPERTS, TOP_K, TOKENS, STEPS = 6, 2, 24, 4000
MOE_LAYERS = ["model.layers.2.mlp.experts", "model.layers.4.mlp.experts"]
MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


def attach(folder: str):
    """(the model, as `load_model` makes it, and its attachment) on one of two tensor-parallel ranks."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from ep_rebalance.engines.vllm import register
    from ep_rebalance.engines.vllm.seams import cpu_experts, prepare_finalize
    from ep_rebalance.engines.vllm.seams.attachment import Attachment

    register()
    vllm_config = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enable_expert_parallel=True,
        tensor_parallel_size=dist.get_world_size(),
        load_format="dummy",
        additional_config={"ep_rebalance": {**EAGER, "trace": {"path": folder}}},
    ).create_engine_config()
    cpu_experts.install()  # as in a worker: vLLM's kernel takes ids of other ranks for its own
    prepare_finalize.install()
    with set_current_vllm_config(vllm_config):
        model = get_model(vllm_config=vllm_config)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for layer in model.moe_layers:  # dummy weights are equal on all ranks
            for weights in layer.get_expert_weights():
                weights.copy_(torch.randn(weights.shape, generator=generator))
        runner = SimpleNamespace(get_model=lambda: model)
        return model, Attachment.create(runner, vllm_config, torch.device("cpu"))


def fingerprints(model) -> list[list[str]]:
    """By layer and slot of this rank: the bytes of an expert."""
    return [
        [
            hashlib.sha256(
                b"".join(weights[slot].numpy().tobytes() for weights in layer)
            ).hexdigest()
            for slot in range(len(layer[0]))
        ]
        for layer in (
            [weights.view(torch.uint8) for weights in layer.get_expert_weights()]
            for layer in model.moe_layers
        )
    ]


def serve(rank: int, folder: str):
    """Steps whose tokens choose the experts of rank 0 only, until experts of every layer have moved."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    join(rank)
    model, attached = attach(folder)
    before = fingerprints(model)
    session = attached.sessions.target
    ids_TK = torch.tensor([[0, 1]] * (TOKENS // 2) + [[0, 2]] * (TOKENS // 2), dtype=torch.int32)
    phases_T = np.ones(TOKENS, dtype=np.int8)
    for _ in range(STEPS):
        attached.begin_step(phases_T, np.array([TOKENS]), started=0.0, continues=True)
        for layer in model.moe_layers:
            layer.router._ep_rebalance_route(ids_TK)
        session.end_step()
        told = json.loads(session.load())
        if all(layer["slots"] != list(range(EXPERTS)) for layer in told["layers"]):
            break
    names = [layer.routed_experts.layer_name for layer in model.moe_layers]
    session.record(False)
    return model.num_moe_layers, names, told, before, fingerprints(model)


def test_layers_are_those_that_are_there_and_their_experts_move_whole(
    two_ranks: Ranks, tmp_path: Path, compiled_planner: None
):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (stated, names, told, *mine), (*_, theirs_before, theirs_after) = two_ranks.run(
        serve, str(tmp_path), timeout=IMPORT_SECONDS
    )
    assert stated > len(names)
    assert names == MOE_LAYERS
    assert len(told["layers"]) == len(names)
    for layer, load in enumerate(told["layers"]):
        original = mine[0][layer] + theirs_before[layer]
        assert load["slots"] != list(range(EXPERTS))
        assert mine[1][layer] + theirs_after[layer] == [original[e] for e in load["slots"]]
        assert sum(load["tokens"]["decode"]) % (TOKENS * TOP_K) == 0
        assert load["tokens"]["decode"][3:] == [0, 0, 0]
