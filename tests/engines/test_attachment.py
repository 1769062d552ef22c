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
    from ep_rebalance.engines.vllm.seams import attachment, joined_model

    group = SimpleNamespace(world_size=2, rank_in_group=1)
    monkeypatch.setattr(joined_model, "tensor_group", lambda: group)
    monkeypatch.setattr(joined_model, "ep_group", lambda: group)
    return attachment


@pytest.fixture
def joined_model(attachment):
    from ep_rebalance.engines.vllm.seams import joined_model

    return joined_model


def test_tensor_parallel_ranks_share_tokens_unless_the_layers_split_them(joined_model):
    assert joined_model._tokens_are_shared(model(layer(), layer()))
    assert not joined_model._tokens_are_shared(model(layer(split=True)))
    joined_model.tensor_group().world_size = 1
    assert not joined_model._tokens_are_shared(model(layer()))


def test_layers_that_disagree_are_refused(joined_model):
    with pytest.raises(ConfigurationError, match="sequence-parallel and others are not"):
        joined_model._tokens_are_shared(model(layer(), layer(split=True)))


def test_a_kernel_that_routes_by_itself_is_refused_with_its_layer(joined_model):
    joined_model._refuse_unseen_routing(layer())
    with pytest.raises(ConfigurationError, match="routes tokens by itself") as raised:
        joined_model._refuse_unseen_routing(layer(monolithic=True))
    assert "model.layers.7.mlp.experts" in raised.value.reason
    assert "--moe-backend" in raised.value.remedy


def test_experts_that_were_dealt_out_round_robin_are_shown_where_they_are(joined_model):
    dealt = joined_model._loaded_placement(model(layer(strategy="round_robin")), 0)
    assert dealt.slots_LP.tolist() == [[0, 2, 1, 3]]
    loaded = joined_model._loaded_placement(model(layer()), 0)
    assert loaded.slots_LP.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ConfigurationError, match="round_robin") as raised:
        joined_model._refuse_dealt_out(model(layer(strategy="round_robin")))
    assert "data_plane.all_to_all=engine" in raised.value.remedy
    joined_model._refuse_dealt_out(model(layer()))


def test_a_drafter_stays_in_place_also_in_a_stage_without_experts(attachment, monkeypatch):
    drafter, left = SimpleNamespace(model=object()), []
    monkeypatch.setattr(attachment, "active_config", lambda _: eager())
    monkeypatch.setattr(attachment, "moe_model", lambda _: None)
    monkeypatch.setattr(attachment, "find_drafter", lambda _: drafter)
    monkeypatch.setattr(attachment, "leave_in_place", lambda model, device: left.append(model))
    runner = SimpleNamespace(get_model=lambda: None)
    assert attachment.Attachment.create(runner, None, torch.device("cpu")) is None
    assert left == [drafter.model]


class Layer(torch.nn.Module):
    """A MoE layer of two experts on one rank, with what the adapter asks of one."""

    expert_placement_strategy = "linear"
    is_monolithic = False
    moe_config = SimpleNamespace(
        is_sequence_parallel=False, num_experts=2, experts_per_token=2, ep_size=1
    )

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


class Proposer:
    """A V1 runner's drafter, with the model that it was given."""

    def __init__(self, model):
        self.model = model

    def set_eplb_state(self, state):
        self.eplb_state = state


def moe_module(*layers):
    """A model of these layers, with what the adapter asks of one."""
    module = torch.nn.Module()
    module.moe_layers = torch.nn.ModuleList(layers)
    module.name, module.num_logical_experts, module.layer_numbers, module.slots = "Model", 2, (), 2
    return module


@pytest.fixture
def joined(attachment, joined_model, monkeypatch, tmp_path, compiled_planner):
    """`Attachment.create` for a model of two such layers, on a process group of this process alone."""
    from ep_rebalance.engines.vllm.seams import drafts

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    world = dist.group.WORLD
    group = SimpleNamespace(world_size=1, rank_in_group=0, device_group=world, cpu_group=world)
    identity = ModelIdentity(model="m", config_hash="h", experts=2, ep_size=1, redundant_experts=0)
    monkeypatch.setattr(attachment, "moe_model", lambda model: model)
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
    for module in (attachment, drafts):
        monkeypatch.setattr(module, "moe_layers_of", lambda m: iter(getattr(m, "moe_layers", ())))
    for name, part in parts.items():
        monkeypatch.setattr(joined_model, name, part)

    def join(config, drafter=None):
        for module in (attachment, joined_model):
            monkeypatch.setattr(module, "active_config", lambda _: config)
        target = moe_module(Layer(), Layer())
        vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=16, max_num_seqs=4),
            model_config=SimpleNamespace(get_hidden_size=lambda: 3),
            speculative_config=SimpleNamespace(
                num_speculative_tokens=2,
                draft_model_config=SimpleNamespace(get_hidden_size=lambda: 3),
            ),
        )
        runner = SimpleNamespace(get_model=lambda: target, drafter=drafter)
        joined = attachment.Attachment.create(runner, vllm_config, torch.device("cpu"))
        return joined, target.moe_layers

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["rebalance", "observe"])
def test_routers_of_a_joined_model_count_the_tokens_of_a_step(joined, mode):
    config = eager({"mode": mode})
    attached, layers = joined(config)
    phases_T, tokens_R = np.array([0, 1, 1], dtype=np.int8), np.array([1, 1, 1])
    attached.begin_step(phases_T, tokens_R, started=0.0, continues=False)
    assert attached.sessions.target.busy
    ids_TK = torch.tensor([[0, 1], [1, 0], [1, 0]], dtype=torch.int32)
    for layer in layers:
        assert layer.router._ep_rebalance_route(ids_TK).tolist() == ids_TK.tolist()
    for _ in range(config.window.snapshot_steps + 2):
        attached.sessions.target.end_step()
    assert not attached.sessions.target.busy
    counted = json.loads(attached.sessions.target.load())["layers"]
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
    head = attached.sessions.target._recorder._writer._head
    assert head.engine == f"vllm {vllm.__version__}"
    assert (head.model, head.top_k, head.hidden_size, head.expert_bytes) == ("m", 2, 3, [12, 12])
    assert attached.sessions.target.record(False)


def test_layers_that_vllm_loads_anew_are_served_as_loaded(joined):
    from ep_rebalance.engines.vllm.seams import expert_loads

    attached, layers = joined(eager())
    reloads = [attached.sessions.target.rebalancer.status.weight_reloads]
    for _ in range(2):
        for layer in layers:
            expert_loads._count(lambda *_: None, layer.routed_experts)
        attached.weights_loaded()
        reloads.append(attached.sessions.target.rebalancer.status.weight_reloads)
    assert reloads == [0, 1, 2]


PHASES_T, TOKENS_R = np.array([0, 0, 1], dtype=np.int8), np.array([2, 1])
ROW = torch.tensor([[0, 1]] * 6, dtype=torch.int32)


def draft_a_step(attached, proposer, steps):
    """The first pass with the target's rows and a later one, padded; then until all is in a snapshot."""
    attached.begin_step(PHASES_T, TOKENS_R, started=0.0, continues=False)
    (layer,) = proposer.model.moe_layers
    for rows in (3, 2):
        proposer.eplb_state.prepare_forward(None, rows)
        layer.router._ep_rebalance_route(ROW)
    for _ in range(steps):
        attached.sessions.end_step()


@pytest.mark.parametrize("setting", ["pinned", "balanced"])
def test_a_drafter_is_counted_apart_and_balanced_if_it_is_to_be(joined, setting):
    from ep_rebalance.engines.vllm.seams import expert_loads

    config, proposer = eager({"drafter": setting}), Proposer(moe_module(Layer()))
    (layer,) = proposer.model.moe_layers
    expert_loads._count(lambda *_: None, layer.routed_experts)
    attached, _ = joined(config, proposer)
    draft_a_step(attached, proposer, config.window.snapshot_steps + 2)
    load, status = (
        json.loads(told()) for told in (attached.sessions.load, attached.sessions.status)
    )
    assert [one["tokens"] for one in load["layers"]] == [{"prefill": [0, 0], "decode": [0, 0]}] * 2
    (drafted,) = load["drafter"]["layers"]
    assert drafted["tokens"] == {"prefill": [2, 2], "decode": [3, 3]}
    mode = "observe" if setting == "pinned" else "rebalance"
    assert status["drafter"]["info"]["mode"] == mode
    # Two passes of one layer beside two layers of the target.
    assert attached.sessions.drafter.config.decision.expert_time_fraction == pytest.approx(0.25)
    # Without `enable_eplb` a router has no such state; with it, it insists on one.
    assert hasattr(layer.router.eplb_state, "expert_load_view")


def test_only_loads_of_a_drafter_are_taken_up_for_it(joined):
    from ep_rebalance.engines.vllm.seams import expert_loads

    proposer = Proposer(moe_module(Layer()))
    (layer,) = proposer.model.moe_layers
    expert_loads._count(lambda *_: None, layer.routed_experts)
    attached, _ = joined(eager({"drafter": "balanced"}), proposer)

    def reloads():
        return [s.rebalancer.status.weight_reloads for s in attached.sessions.both]

    attached.weights_loaded()  # nobody saw how the target's were loaded: it counts as a reload
    attached.target_replaced()
    assert reloads() == [2, 0]
    expert_loads._count(lambda *_: None, layer.routed_experts)
    attached.begin_step(PHASES_T, TOKENS_R, started=0.0, continues=False)
    assert reloads() == [2, 1]
    attached.weights_replaced()  # all memory of weights was given back
    assert reloads() == [3, 2]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"is_monolithic": True}, "routes tokens by itself"),
        ({"moe_config": SimpleNamespace(**{**vars(Layer.moe_config), "ep_size": 2})}, "not spread"),
    ],
)
def test_a_drafter_that_cannot_be_counted_serves_pinned_and_is_refused_balanced(
    joined, monkeypatch, caplog, fault, told
):
    class Unfit(Layer):
        pass

    for name, value in fault.items():
        monkeypatch.setattr(Unfit, name, value, raising=False)
    proposer = Proposer(moe_module(Unfit()))
    attached, _ = joined(eager(), proposer)
    status = json.loads(attached.sessions.status())
    assert status["drafter"] is None
    assert told in status["uncounted_drafter"]
    assert told in caplog.text
    (layer,) = proposer.model.moe_layers
    assert torch.equal(layer.router._ep_rebalance_route(ROW), ROW)
    with pytest.raises(ConfigurationError, match=told) as raised:
        joined(eager({"drafter": "balanced"}), Proposer(moe_module(Unfit())))
    assert raised.value.remedy == "set drafter=pinned."


def test_a_drafter_whose_loads_nobody_saw_is_not_balanced(joined):
    with pytest.raises(ConfigurationError, match="not loaded by vLLM's own loader"):
        joined(eager({"drafter": "balanced"}), Proposer(moe_module(Layer())))


def test_a_drafter_whose_trace_cannot_be_written_ends_the_start(joined, tmp_path):
    """Only the rank that writes it knows: without its session, it would leave the others waiting."""
    (tmp_path / "drafter").write_text("in the place of a folder")
    with pytest.raises(ConfigurationError, match=r"trace\.path"):
        joined(eager({"trace": {"path": str(tmp_path)}}), Proposer(moe_module(Layer())))


def test_a_dense_drafter_has_no_session(joined):
    attached, _ = joined(eager({"drafter": "balanced"}), Proposer(torch.nn.Linear(1, 1)))
    status = json.loads(attached.sessions.status())
    assert (status["drafter"], status["uncounted_drafter"]) == (None, "")


def test_a_drafter_with_copies_that_nothing_was_loaded_into_is_not_counted(joined):
    from ep_rebalance.engines.vllm.seams import expert_loads

    class Copied(Layer):
        moe_config = SimpleNamespace(**{**vars(Layer.moe_config), "num_experts": 4})

    drafter = moe_module(Copied())
    drafter.slots = 4
    (layer,) = drafter.moe_layers
    for expert in (0, 1):
        expert_loads._count(
            lambda *_, **__: None, layer.routed_experts, "w2", 0.0, shard_id="w2", expert_id=expert
        )
    attached, _ = joined(eager(), Proposer(drafter))
    assert "loads no copies" in json.loads(attached.sessions.status())["uncounted_drafter"]
    assert torch.equal(layer.router._ep_rebalance_route(ROW), ROW)
    with pytest.raises(ConfigurationError, match="loads no copies"):
        joined(eager({"drafter": "balanced"}), Proposer(drafter))


def test_a_target_is_known_by_the_slots_that_nothing_was_loaded_into(joined, joined_model):
    """As of a checkpoint with one tensor for all experts of a layer."""
    from ep_rebalance.engines.vllm.seams import expert_loads

    class Copied(Layer):
        moe_config = SimpleNamespace(**{**vars(Layer.moe_config), "num_experts": 4})

    target = moe_module(Copied())
    target.slots = 4
    (layer,) = target.moe_layers
    engine = SimpleNamespace(
        model_config=None, scheduler_config=SimpleNamespace(max_num_batched_tokens=16)
    )

    def load(*slots):
        for slot in slots:
            expert_loads._count(lambda *_, **__: None, layer.routed_experts, expert_id=slot)

    def loaded():
        return joined_model.loaded_target(
            target, engine, eager({"planner": {"redundant_experts": 2}})
        )

    load(0)
    with pytest.raises(ConfigurationError, match="only some of its experts") as refused:
        loaded()
    assert "planner.redundant_experts=0" in refused.value.remedy
    load(1)
    assert loaded().unfilled
    load(2, 3)
    assert not loaded().unfilled


def test_slots_of_a_drafter_that_ranks_cannot_share_are_refused(joined_model):
    told = SimpleNamespace(name="Drafter", num_logical_experts=5)
    for slots in (5, 6):
        told.slots = slots
        joined_model._refuse_unshared(told)
    told.slots = 7
    with pytest.raises(ConfigurationError, match="7 slots of Drafter for 5 experts"):
        joined_model._refuse_unshared(told)


def test_a_drafter_serves_beside_experts_that_are_in_no_parameters(
    joined, joined_model, monkeypatch
):
    monkeypatch.setattr(joined_model, "listed_bytes", lambda _: 0)
    attached, _ = joined(eager(), Proposer(moe_module(Layer())))
    # Two passes of one layer beside two layers of the target.
    assert attached.sessions.drafter.config.decision.expert_time_fraction == pytest.approx(0.25)


def test_a_drafter_that_lists_no_layers_in_a_pipeline_serves_uncounted(
    joined, joined_model, monkeypatch
):
    monkeypatch.setattr(joined_model, "moe_model", lambda _: None)
    attached, _ = joined(eager(), Proposer(moe_module(Layer())))
    status = json.loads(attached.sessions.status())
    assert "does not list its MoE layers" in status["uncounted_drafter"]
