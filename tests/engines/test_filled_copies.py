"""Checkpoints of which vLLM loads no copies: redundant slots are filled before serving, and when reloaded."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balanced_engine import EAGER
from moe_checkpoints import fuse_experts, write_checkpoint
from moe_families import BY_NAME, EXPERTS, HIDDEN, TOP_K
from ranks import Ranks
from test_real_model import fingerprints
from vllm_groups import IMPORT_SECONDS, join

from ep_rebalance.config import ConfigurationError
from ep_rebalance.migration import round_exchange
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.migration.slabs import NamedTensor, split_by_expert
from ep_rebalance.placement import Placement

REDUNDANT, TOKENS, STEPS = 2, 12, 4000
COPIED = [*range(EXPERTS), *range(REDUNDANT)]
PHASES_T = np.ones(TOKENS, dtype=np.int8)


def load(folder: str):
    """(vLLM's configuration, the model) on one of two tensor-parallel ranks."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from ep_rebalance.engines.vllm import register
    from ep_rebalance.engines.vllm.seams import cpu_experts, expert_loads, prepare_finalize, router

    register()
    settings = {**EAGER, "planner": {**EAGER["planner"], "redundant_experts": REDUNDANT}}
    vllm_config = EngineArgs(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enable_expert_parallel=True,
        tensor_parallel_size=dist.get_world_size(),
        additional_config={"ep_rebalance": settings},
    ).create_engine_config()
    for seam in (cpu_experts, prepare_finalize, expert_loads, router):
        seam.install()
    with set_current_vllm_config(vllm_config):
        return vllm_config, get_model(vllm_config=vllm_config)


def spoil_copies(model) -> None:
    """As memory may be in which nothing was written."""
    for layer in model.moe_layers:
        local = layer.routed_experts.local_num_experts
        empty = [slot for slot in range(local) if dist.get_rank() * local + slot >= EXPERTS]
        for weights in layer.get_expert_weights():
            weights[empty] = torch.nan


def outputs(vllm_config, model, attached, quotas_P) -> list[torch.Tensor]:
    """Of every layer, for tokens of the experts that have copies, split by `quotas_P`."""
    from vllm.forward_context import set_forward_context

    session = attached.sessions.target
    served = session.rebalancer.served
    quotas_LP = np.tile(quotas_P, (served.placement.num_layers, 1))
    layers = range(len(model.moe_layers))
    session._counts.set_dispatch(layers, served.placement, quotas_LP, strictly=True)
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    logits_TE = torch.full((TOKENS, EXPERTS), -9.0)
    logits_TE[:, :TOP_K] = torch.rand(TOKENS, TOP_K, generator=generator)
    with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=TOKENS):
        computed = [layer(hidden_TH.clone(), logits_TE).clone() for layer in model.moe_layers]
    session._counts.set_dispatch(layers, served.placement, served.quotas_LP)
    return computed


def step(model, attached, ids=(0, 1)) -> torch.Tensor:
    """The slots to which the tokens of a step went, in all layers."""
    attached.begin_step(PHASES_T, np.array([TOKENS]), started=0.0, continues=True)
    ids_TK = torch.tensor([ids] * TOKENS, dtype=torch.int32)
    slots = [layer.router._ep_rebalance_route(ids_TK).clone() for layer in model.moe_layers]
    attached.sessions.end_step()
    return torch.cat(slots).unique()


def serve(rank: int, folder: str, other: str, computes: bool):
    """computes: whether vLLM's router for CPU can choose the model's experts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    join(rank)
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    from ep_rebalance.engines.vllm.seams.attachment import Attachment

    vllm_config, model = load(folder)
    seen = {"as vLLM loads it": fingerprints(model)}
    spoil_copies(model)
    with set_current_vllm_config(vllm_config):
        runner = SimpleNamespace(get_model=lambda: model)
        attached = Attachment.create(runner, vllm_config, torch.device("cpu"))
    seen["attached"] = fingerprints(model)

    first_P = (np.arange(len(COPIED)) < EXPERTS).astype(float)
    last_P = np.array([slot not in range(REDUNDANT) for slot in range(len(COPIED))], dtype=float)
    ways = (first_P, last_P) if computes else ()
    split = [outputs(vllm_config, model, attached, quotas_P) for quotas_P in ways]
    for originals, copies in zip(*split, strict=True):
        assert originals.abs().max() > 0.01
        torch.testing.assert_close(originals, copies)

    session = attached.sessions.target
    for _ in range(STEPS):
        step(model, attached, ids=(0, 2))
        if session.has_moved_experts:
            break
    slots = json.loads(session.load())["layers"]
    seen["moved"] = fingerprints(model)

    # As vLLM's runner does it, and then our seam.
    with set_current_vllm_config(vllm_config):
        reload_weights(vllm_config, model, None, weights_path=other, is_checkpoint_format=True)
    attached.weights_loaded()
    reached = set()
    for _ in range(STEPS):
        if session.rebalancer.migrator.agreed_reloads:
            break
        reached |= set(step(model, attached).tolist())
    served = session.rebalancer.served
    seen["reloaded"] = fingerprints(model)
    assert served.placement.slots_LP.tolist() == [COPIED] * len(model.moe_layers)
    assert (served.quotas_LP == served.placement.even_quotas_LP()).all()
    return seen, [layer["slots"] for layer in slots], reached, set(step(model, attached).tolist())


@pytest.mark.parametrize(
    ("family", "fuse"),
    [
        pytest.param("qwen3_moe", True, id="vLLM's loader of experts"),
        pytest.param("step3p5", False, id="the model's own loader"),
    ],
)
def test_copies_that_vllm_does_not_load_are_filled(
    two_ranks: Ranks, tmp_path: Path, compiled_planner: None, family: str, fuse: bool
):
    folders = [write_checkpoint(BY_NAME[family], tmp_path / f"{seed}", seed) for seed in (0, 1)]
    if fuse:
        for folder in folders:
            fuse_experts(folder)
    given = (*map(str, folders), family == "qwen3_moe")
    ours, theirs = two_ranks.run(serve, *given, timeout=IMPORT_SECONDS)
    seen = {
        when: [[*mine, *yours] for mine, yours in zip(ours[0][when], theirs[0][when], strict=True)]
        for when in ours[0]
    }
    for layer, loaded in enumerate(seen["as vLLM loads it"]):
        originals = loaded[:EXPERTS]
        assert len(set(originals)) == EXPERTS
        assert not set(loaded[EXPERTS:]) & set(originals)  # what the test is about
        assert seen["attached"][layer] == [originals[expert] for expert in COPIED]
        assert seen["moved"][layer] == [originals[expert] for expert in ours[1][layer]]
        again = seen["reloaded"][layer][:EXPERTS]
        assert not set(again) & set(originals)
        assert seen["reloaded"][layer] == [again[expert] for expert in COPIED]
    assert ours[1] != [COPIED] * len(ours[1])
    for _, _, reached, _ in (ours, theirs):
        assert reached <= {0, 1}  # until all ranks have them, no token goes to a copy
    assert ours[3] | theirs[3] == {0, 1, EXPERTS, EXPERTS + 1}


def fill_without_memory(rank: int) -> str:
    join(rank)
    from ep_rebalance.engines.vllm import movable_experts
    from ep_rebalance.engines.vllm.expert_tensors import LayerTensors

    def full(**told):
        if rank == 1:
            raise torch.OutOfMemoryError("no memory on this device")
        return RoundExchange(**told)

    experts = NamedTensor("w13_weight", torch.zeros(2, 8))
    layer = LayerTensors(
        layer="model.layers.0.mlp.experts",
        scheme="made up",
        experts=2,
        slabs=split_by_expert([experts], 2).slabs,
        common=(),
        refusals=(),
    )
    placement = Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2, num_redundant=2)
    with (
        mock.patch.object(round_exchange, "RoundExchange", full),
        pytest.raises(ConfigurationError) as raised,
    ):
        movable_experts._fill([layer], placement, dist.group.WORLD)
    return str(raised.value)


def test_a_rank_without_memory_for_copies_keeps_no_other_waiting(
    two_ranks: Ranks, compiled_planner: None
):
    ours, theirs = two_ranks.run(fill_without_memory, timeout=IMPORT_SECONDS)
    assert ours == theirs
    assert "1 rank(s) lack memory" in ours
