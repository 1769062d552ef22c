"""vLLM's own MTP layer of DeepSeek-V3, in vLLM's own proposer: counted apart, and its experts moved."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from balanced_engine import EAGER
from moe_checkpoints import write_checkpoint
from moe_families import FAMILIES
from mtp_checkpoints import add_mtp_layer
from ranks import Ranks
from test_real_model import EXPERTS, MODEL, TOP_K, fingerprints
from vllm_groups import IMPORT_SECONDS, join

LAYERS, DRAFTS, STEPS = 3, 2, 4000
TOKENS_R = np.array([9, 1, 1, 1])
PHASES_T = np.array([0] * 9 + [1] * 3, dtype=np.int8)
PADDED = 16
DRAFTING = {
    **MODEL,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": LAYERS,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}


def engine(folder: str, settings: dict, **arguments):
    """The configuration of one of two tensor-parallel ranks, in which the adapter is installed."""
    from vllm.engine.arg_utils import EngineArgs

    from ep_rebalance.engines.vllm import register
    from ep_rebalance.engines.vllm.seams import cpu_experts, expert_loads, prepare_finalize
    from ep_rebalance.engines.vllm.seams.activation import allow_balancing

    register()
    vllm_config = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enable_expert_parallel=True,
        tensor_parallel_size=dist.get_world_size(),
        speculative_config={"method": "mtp", "num_speculative_tokens": DRAFTS},
        additional_config={"ep_rebalance": settings},
        **arguments,
    ).create_engine_config()
    allow_balancing()  # as in a worker, like what follows: the drafter's configuration is made anew
    cpu_experts.install()  # vLLM's kernel takes ids of other ranks for its own
    prepare_finalize.install()
    expert_loads.install()
    return vllm_config


def loaded(vllm_config):
    """The target and its proposer."""
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.spec_decode.eagle import EagleProposer

    model = get_model(vllm_config=vllm_config)
    proposer = EagleProposer(vllm_config, torch.device("cpu"))
    proposer.load_model(model)
    return model, proposer


def attach(folder: str):
    """(the target, the proposer, and their attachment) on one of two tensor-parallel ranks."""
    from vllm.config import set_current_vllm_config

    from ep_rebalance.engines.vllm.seams import expert_loads
    from ep_rebalance.engines.vllm.seams.attachment import Attachment

    settings = {**EAGER, "drafter": "balanced"}
    vllm_config = engine(folder, settings, load_format="dummy")
    with set_current_vllm_config(vllm_config):
        model, proposer = loaded(vllm_config)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for layer in [*model.moe_layers, *proposer.model.moe_layers]:
            for weights in layer.get_expert_weights():  # dummy weights are equal on all ranks
                weights.copy_(torch.randn(weights.shape, generator=generator))
            # Of dummy weights no loader is called.
            expert_loads._count(lambda *_: None, layer.routed_experts)
        runner = SimpleNamespace(get_model=lambda: model, drafter=proposer)
        return model, proposer, Attachment.create(runner, vllm_config, torch.device("cpu"))


def serve(rank: int, folder: str):
    """Steps whose drafts choose the experts of rank 0 only, until experts of the drafter have moved."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    join(rank)
    model, proposer, attached = attach(folder)
    before = fingerprints(proposer.model)
    rows = torch.tensor([[0, 1]] * (PADDED // 2) + [[0, 2]] * (PADDED // 2), dtype=torch.int32)
    (drafted,) = proposer.model.moe_layers
    busy = 0
    for _ in range(STEPS):
        attached.begin_step(PHASES_T, TOKENS_R, started=0.0, continues=True)
        for layer in model.moe_layers:
            layer.router._ep_rebalance_route(rows)
        for tokens in (len(PHASES_T), *[len(TOKENS_R)] * (DRAFTS - 1)):
            proposer.eplb_state.prepare_forward(proposer.draft_model_config, tokens)
            drafted.router._ep_rebalance_route(rows)
        attached.sessions.end_step()
        busy += 1
        told = json.loads(attached.sessions.load())
        if told["drafter"]["layers"][0]["slots"] != list(range(EXPERTS)):
            break
    for _ in range(4 * attached.sessions.target.config.window.snapshot_steps):
        attached.sessions.end_step()
    load, status = (
        json.loads(asked()) for asked in (attached.sessions.load, attached.sessions.status)
    )
    return busy, load, status, before, fingerprints(proposer.model)


def test_an_mtp_layer_in_its_proposer_is_counted_apart_and_its_experts_move_whole(
    two_ranks: Ranks, tmp_path: Path, compiled_planner: None
):
    (tmp_path / "config.json").write_text(json.dumps(DRAFTING))
    (busy, load, status, *mine), (*_, theirs_before, theirs_after) = two_ranks.run(
        serve, str(tmp_path), timeout=IMPORT_SECONDS
    )
    assert status["moe_layers"] == [1, 2]
    assert status["drafter"]["moe_layers"] == [LAYERS]
    (drafted,) = load["drafter"]["layers"]
    assert sum(drafted["tokens"]["prefill"]) == busy * 9 * TOP_K
    later = (DRAFTS - 1) * len(TOKENS_R)
    assert sum(drafted["tokens"]["decode"]) == busy * (3 + later) * TOP_K
    assert [sum(layer["tokens"]["decode"]) for layer in load["layers"]] == [busy * 3 * TOP_K] * 2
    (mine_before,), (mine_after,) = mine
    loaded = mine_before + theirs_before[0]
    assert len(set(loaded)) == EXPERTS
    assert drafted["slots"] != list(range(EXPERTS))
    assert mine_after + theirs_after[0] == [loaded[expert] for expert in drafted["slots"]]


def serve_with_copies(rank: int, folder: str):
    """(what the status says of the drafter, and how it routes experts of which vLLM has made copies)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    join(rank)
    from vllm.config import set_current_vllm_config

    from ep_rebalance.engines.vllm.seams.attachment import Attachment

    settings = {**EAGER, "planner": {**EAGER["planner"], "redundant_experts": 2}}
    vllm_config = engine(folder, settings)
    with set_current_vllm_config(vllm_config):
        model, proposer = loaded(vllm_config)
        runner = SimpleNamespace(get_model=lambda: model, drafter=proposer)
        attached = Attachment.create(runner, vllm_config, torch.device("cpu"))
    status = json.loads(attached.sessions.status())
    rows = torch.tensor([[0, 1]] * 64, dtype=torch.int32)
    (drafted,) = proposer.model.moe_layers
    return status["uncounted_drafter"], drafted.router._ep_rebalance_route(rows).unique().tolist()


def test_no_token_goes_to_copies_that_an_mtp_layer_makes_and_does_not_load(
    two_ranks: Ranks, tmp_path: Path, compiled_planner: None
):
    (family,) = (family for family in FAMILIES if family.name == "deepseek_v3")
    folder = write_checkpoint(family, tmp_path / family.name)
    add_mtp_layer(folder)
    for uncounted, slots in two_ranks.run(serve_with_copies, str(folder), timeout=IMPORT_SECONDS):
        assert "DeepSeekMTP makes redundant slots and loads no copies" in uncounted
        assert slots == [0, 1]
