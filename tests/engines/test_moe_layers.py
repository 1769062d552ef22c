"""Which layers of a model are balanced, with and without vLLM's protocol for its own balancer."""

from types import SimpleNamespace

import pytest
import torch

from ep_rebalance.config import ConfigurationError
from ep_rebalance.pipeline import ONLY_STAGE, PipelineStage


def moe_config(experts=4, slots=4, top_k=2):
    return SimpleNamespace(num_logical_experts=experts, num_experts=slots, experts_per_token=top_k)


@pytest.fixture
def layer(vllm):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    class Layer(MoERunnerInterface):
        """A MoE layer, and nothing that computes."""

        def __init__(self, number, **sizes):
            torch.nn.Module.__init__(self)
            self.layer_name = f"model.layers.{number}.mlp.experts"
            self.moe_config = moe_config(**sizes)

        def forward(self):
            raise NotImplementedError

    Layer.__abstractmethods__ = frozenset()
    return Layer


@pytest.fixture
def seam(vllm):
    from ep_rebalance.engines.vllm.seams import moe_layers

    return moe_layers


def bare(*layers):
    """A model without the protocol: all that it has is its modules."""
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(1, 1), layer) for layer in layers
    )
    return model


def test_a_model_without_the_protocol_is_taken_layer_by_layer(seam, layer):
    layers = (layer(1), layer(3))
    found = seam.moe_model(bare(*layers))
    assert found.moe_layers == layers
    assert found.layer_numbers == (1, 3)
    assert (found.name, found.num_logical_experts) == ("Module", 4)
    seam.refuse_unlike(found, redundant_experts=0)


def test_a_model_with_the_protocol_says_itself_which_layers_it_has(seam, layer, monkeypatch):
    listed = SimpleNamespace(moe_layers=[layer(2, slots=6)], num_logical_experts=4)
    found = "vllm.model_executor.models.interfaces.get_mixture_of_experts_model"
    monkeypatch.setattr(found, lambda model: listed)
    model = seam.moe_model(bare(layer(1), layer(2)))
    assert model.layer_numbers == (2,)
    seam.refuse_unlike(model, redundant_experts=2)


def test_encoders_of_images_are_left_out(seam, layer, monkeypatch):
    text, whole = bare(layer(5)), bare(layer(0))
    interfaces = "vllm.model_executor.models.interfaces"
    monkeypatch.setattr(f"{interfaces}.get_mixture_of_experts_model", lambda model: None)
    monkeypatch.setattr(f"{interfaces}.SupportsMultiModal", torch.nn.Module)
    whole.get_language_model = lambda: text
    assert seam.moe_model(whole).layer_numbers == (5,)


def test_a_pipeline_stage_without_experts_is_left_alone(seam, monkeypatch):
    monkeypatch.setattr(seam, "pipeline_stage", lambda: PipelineStage(0, 2))
    assert seam.moe_model(bare()) is None


def test_a_model_without_layers_that_have_experts_is_refused(seam, monkeypatch):
    monkeypatch.setattr(seam, "pipeline_stage", lambda: ONLY_STAGE)
    with pytest.raises(ConfigurationError, match="no Mixture-of-Experts layers") as raised:
        seam.moe_model(bare())
    assert "without --plugin ep_rebalance" in raised.value.remedy


def test_experts_without_vllms_router_are_refused_by_their_class(seam, monkeypatch):
    """Those of the backend deep_gemm_mega_moe, which DeepSeek-V4 lists in the place of its MoE layers."""

    class MegaMoEExperts(torch.nn.Module):
        pass

    listed = SimpleNamespace(moe_layers=[MegaMoEExperts()], num_logical_experts=4)
    found = "vllm.model_executor.models.interfaces.get_mixture_of_experts_model"
    monkeypatch.setattr(found, lambda model: listed)
    with pytest.raises(ConfigurationError, match=r"MegaMoEExperts.*be counted") as raised:
        seam.moe_model(bare())
    assert "--moe-backend" in raised.value.remedy


@pytest.mark.parametrize("name", ["model.mlp.experts", "model.layers.2.mlp.1.experts"])
def test_a_layer_whose_number_its_name_does_not_say_is_refused(seam, layer, name):
    found = seam.moe_model(bare(layer(1), layer(2)))
    found.moe_layers[1].layer_name = name
    with pytest.raises(ConfigurationError, match=f"Module names a MoE layer '{name}'") as raised:
        _ = found.layer_numbers
    assert "without --plugin ep_rebalance" in raised.value.remedy


def test_redundant_experts_are_refused_where_the_model_has_no_room_for_them(seam, layer):
    with pytest.raises(ConfigurationError, match="Module makes no room for redundant") as raised:
        seam.refuse_unlike(seam.moe_model(bare(layer(0))), redundant_experts=2)
    assert "planner.redundant_experts=0" in raised.value.remedy


@pytest.mark.parametrize("sizes", [{"experts": 8, "slots": 8}, {"top_k": 4}, {"slots": 6}])
def test_layers_of_unlike_sizes_are_refused(seam, layer, sizes):
    with pytest.raises(ConfigurationError, match=r"differ in|slots for"):
        seam.refuse_unlike(seam.moe_model(bare(layer(0), layer(1, **sizes))), redundant_experts=0)


def test_slots_that_are_fewer_than_experts_are_refused(seam, layer):
    with pytest.raises(ConfigurationError, match="2 slots for 4 experts"):
        seam.refuse_unlike(seam.moe_model(bare(layer(0, slots=2))), redundant_experts=0)
