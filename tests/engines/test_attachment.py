"""What the layers of a loaded model say, what of it cannot be served, and the session it is joined to."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balanced_engine import eager

from ep_rebalance.config import ConfigurationError
from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.pipeline import ONLY_STAGE
from ep_rebalance.telemetry.self_test import NOT_TRIED
from ep_rebalance.topology import Topology


def layer(*, split=False, monolithic=False, strategy="linear"):
    """What a MoE layer of vLLM tells."""
    experts = SimpleNamespace(layer_name="model.layers.7.mlp.experts", quant_method=object())
    return SimpleNamespace(
        moe_config=SimpleNamespace(is_sequence_parallel=split),
        is_monolithic=monolithic,
        expert_placement_strategy=strategy,
        routed_experts=experts,
    )


def model(*layers):
    return SimpleNamespace(name="Model", moe_layers=layers, num_logical_experts=4)


@pytest.fixture
def attachment(vllm, monkeypatch):
    from ep_rebalance.engines.vllm.seams import attachment

    group = SimpleNamespace(world_size=2, rank_in_group=1)
    monkeypatch.setattr(attachment, "tensor_group", lambda: group)
    monkeypatch.setattr(attachment, "ep_group", lambda: group)
    return attachment


def test_tensor_parallel_ranks_share_tokens_unless_the_layers_split_them(attachment):
    assert attachment._tokens_are_shared(model(layer(), layer()))
    assert not attachment._tokens_are_shared(model(layer(split=True)))
    attachment.tensor_group().world_size = 1
    assert not attachment._tokens_are_shared(model(layer()))


def test_layers_that_disagree_are_refused(attachment):
    with pytest.raises(ConfigurationError, match="sequence-parallel and others are not"):
        attachment._tokens_are_shared(model(layer(), layer(split=True)))


def test_a_kernel_that_routes_by_itself_is_refused_with_its_layer(attachment):
    attachment._refuse_unseen_routing(layer())
    with pytest.raises(ConfigurationError, match="routes tokens by itself") as raised:
        attachment._refuse_unseen_routing(layer(monolithic=True))
    assert "model.layers.7.mlp.experts" in raised.value.reason
    assert "--moe-backend" in raised.value.remedy


def test_experts_that_were_dealt_out_round_robin_are_shown_where_they_are(attachment):
    parallel = SimpleNamespace(eplb_config=SimpleNamespace(num_redundant_experts=0))
    config = SimpleNamespace(parallel_config=parallel)
    dealt = attachment._loaded_placement(model(layer(strategy="round_robin")), config)
    assert dealt.slots_LP.tolist() == [[0, 2, 1, 3]]
    loaded = attachment._loaded_placement(model(layer()), config)
    assert loaded.slots_LP.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ConfigurationError, match="round_robin") as raised:
        attachment._refuse_dealt_out(model(layer(strategy="round_robin")))
    assert "data_plane.all_to_all=engine" in raised.value.remedy
    attachment._refuse_dealt_out(model(layer()))


def test_a_drafter_stays_in_place_also_in_a_stage_without_experts(attachment, monkeypatch):
    drafter, left = object(), []
    monkeypatch.setattr(attachment, "active_config", lambda _: eager())
    monkeypatch.setattr(attachment, "moe_model", lambda _: None)
    monkeypatch.setattr(attachment, "draft_model", lambda _: drafter)
    monkeypatch.setattr(attachment, "leave_in_place", lambda model, device: left.append(model))
    runner = SimpleNamespace(get_model=lambda: None)
    assert attachment.Attachment.create(runner, None, torch.device("cpu")) is None
    assert left == [drafter]


class Layer(torch.nn.Module):
    """A MoE layer of two experts on one rank, with what the adapter asks of one."""

    expert_placement_strategy = "linear"
    is_monolithic = False
    moe_config = SimpleNamespace(is_sequence_parallel=False, num_experts=2, experts_per_token=2)

    def __init__(self):
        super().__init__()
        self.router = SimpleNamespace(top_k=2, eplb_state=SimpleNamespace())
        self.routed_experts = torch.nn.Module()
        self.routed_experts.up = torch.nn.Parameter(torch.zeros(2, 3))
        self.routed_experts.scale = torch.nn.Parameter(torch.zeros(()))
        self.routed_experts.local_num_experts = 2
        self.routed_experts.quant_method = object()
        self.routed_experts.layer_name = "model.layers.0.mlp.experts"


def slabs_as_they_are(layers, *_):
    """In place of a trial, which needs vLLM's own layers (`test_real_model.py`)."""
    from ep_rebalance.engines.vllm.movable_experts import MovableExperts

    return MovableExperts(
        slabs=lambda: [[layer.routed_experts.up.data] for layer in layers],
        refusal=str,
        expert_bytes_L=(12,) * len(layers),
        self_test=NOT_TRIED,
    )


@pytest.fixture
def joined(attachment, monkeypatch, tmp_path, compiled_planner):
    """`Attachment.create` for a model of two such layers, on a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    world = dist.group.WORLD
    group = SimpleNamespace(world_size=1, rank_in_group=0, device_group=world, cpu_group=world)
    identity = ModelIdentity(model="m", config_hash="h", experts=2, ep_size=1, redundant_experts=0)
    parts = {
        "moe_model": lambda model: model,
        "tensor_group": lambda: group,
        "pipeline_stage": lambda: ONLY_STAGE,
        "movable_experts": slabs_as_they_are,
        "ep_group": lambda: group,
        "model_identity": lambda *_: identity,
        "ranks_on_nodes": lambda ranks_per_source: Topology(
            node_of_rank=(0,), ranks_per_source=ranks_per_source
        ),
    }
    for name, part in parts.items():
        monkeypatch.setattr(attachment, name, part)

    def join(config):
        monkeypatch.setattr(attachment, "active_config", lambda _: config)
        target = torch.nn.Module()
        target.moe_layers = torch.nn.ModuleList([Layer(), Layer()])
        target.name, target.num_logical_experts, target.layer_numbers = "Model", 2, ()
        vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(eplb_config=SimpleNamespace(num_redundant_experts=0)),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
            model_config=SimpleNamespace(get_hidden_size=lambda: 3),
        )
        runner = SimpleNamespace(get_model=lambda: target)
        joined = attachment.Attachment.create(runner, vllm_config, torch.device("cpu"))
        return joined, target.moe_layers

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["rebalance", "observe"])
def test_routers_of_a_joined_model_count_the_tokens_of_a_step(joined, mode):
    config = eager({"mode": mode})
    attached, layers = joined(config)
    attached.begin_step(np.array([0, 1, 1], dtype=np.int8), started=0.0, continues=False)
    assert attached.session.busy
    ids_TK = torch.tensor([[0, 1], [1, 0], [1, 0]], dtype=torch.int32)
    for layer in layers:
        assert layer.router._ep_rebalance_route(ids_TK).tolist() == ids_TK.tolist()
    for _ in range(config.window.snapshot_steps + 2):
        attached.session.end_step()
    assert not attached.session.busy
    counted = json.loads(attached.session.load())["layers"]
    assert [layer["tokens"] for layer in counted] == [{"prefill": [1, 1], "decode": [2, 2]}] * 2
    assert hasattr(layers[0].router.eplb_state, "expert_load_view") == (mode == "rebalance")


def test_our_all_to_all_is_refused_where_experts_were_dealt_out(joined, monkeypatch):
    """It would take their tokens to other ranks. On CPU it is the default."""
    monkeypatch.setattr(Layer, "expert_placement_strategy", "round_robin")
    with pytest.raises(ConfigurationError, match="linear placement"):
        joined(eager({"mode": "observe"}))
    joined(eager({"mode": "observe", "data_plane": {"all_to_all": "engine"}}))


def test_a_rank_without_experts_says_nothing_of_their_size(vllm):
    """As with fewer experts than ranks, which vLLM serves where none is to move."""
    from ep_rebalance.engines.vllm.movable_experts import listed_bytes

    experts = Layer().routed_experts
    assert listed_bytes(experts) == 12
    experts.up, experts.local_num_experts = torch.nn.Parameter(torch.zeros(0, 3)), 0
    assert listed_bytes(experts) == 0


def test_a_kernel_that_routes_by_itself_is_refused_before_its_tensors_are_read(joined, monkeypatch):
    monkeypatch.setattr(Layer, "is_monolithic", True)
    with pytest.raises(ConfigurationError, match="routes tokens by itself"):
        joined(eager())


def test_the_trace_of_a_joined_model_tells_the_engine_and_its_sizes(joined, vllm, tmp_path):
    attached, _ = joined(eager({"trace": {"path": str(tmp_path)}}))
    head = attached.session._recorder._writer._head
    assert head.engine == f"vllm {vllm.__version__}"
    assert (head.model, head.top_k, head.hidden_size, head.expert_bytes) == ("m", 2, 3, [12, 12])
    assert attached.session.record(False)


def test_layers_that_vllm_loads_anew_are_served_as_loaded(joined):
    from ep_rebalance.engines.vllm.seams import expert_loads

    attached, layers = joined(eager())
    reloads = [attached.session.rebalancer.status.weight_reloads]
    for _ in range(2):
        for layer in layers:
            expert_loads._count(lambda *_: None, layer.routed_experts)
        attached.weights_loaded()
        reloads.append(attached.session.rebalancer.status.weight_reloads)
    assert reloads == [0, 1, 2]
