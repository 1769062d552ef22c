"""Layers that vLLM would not build with its own balancer on, loaded by vLLM itself."""

import loaded_models
import pytest
import quantised_checkpoints
import reference_experts

from ep_rebalance.config import ConfigurationError, QuantisationConfig
from ep_rebalance.engines.vllm.quantised_pairs import pair_of
from ep_rebalance.engines.vllm.seams import quantised_layers
from ep_rebalance.engines.vllm.seams.quantised_layers import lifts

METHODS = {
    "ct_int8": ("CompressedTensorsW8A8Int8MoEMethod", "TritonExperts"),
    "ct_wna16": ("CompressedTensorsWNA16MoEMethod", "MarlinExperts"),
}
"""By checkpoint: the method that vLLM makes, and a kernel that is listed with it."""
TRIED = {"quantisation": {"unlisted": "self_test"}}


@pytest.fixture(scope="module")
def folder(vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    for name in ("fp8_block", *METHODS):
        quantised_checkpoints.write_checkpoint(name, folder / name)
    with loaded_models.one_rank(folder):
        yield folder


@pytest.fixture
def build(folder, monkeypatch):
    """Load a checkpoint as with a balancer, where its kernel's class has a name of the list."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    reference_experts.install(monkeypatch.setattr)
    monkeypatch.setattr(RoutedExperts, "_get_quant_method", RoutedExperts._get_quant_method)
    # As with Marlin: the reference stands in the place of the one kernel that vLLM's balancer takes.
    refuses = property(lambda _: False)
    monkeypatch.setattr(wna16.CompressedTensorsWNA16MoEMethod, "supports_eplb", refuses)
    experts = reference_experts._experts_class()
    name = experts.__name__

    def build(checkpoint, settings=None, *, kernel=name, seam=True, balanced=True):
        experts.__name__ = kernel
        if seam:
            quantised_layers.install()
        model = loaded_models.load(
            folder / checkpoint, {"ep_rebalance": settings or {}}, balanced=balanced
        )
        return [layer.routed_experts.quant_method for layer in model.layers]

    yield build
    experts.__name__ = name


@pytest.mark.parametrize("checkpoint", METHODS)
def test_vllm_refuses_the_layer_without_the_seam(build, checkpoint):
    with pytest.raises(
        NotImplementedError, match=f"EPLB is not supported {METHODS[checkpoint][0]}"
    ):
        build(checkpoint, seam=False)


@pytest.mark.parametrize("checkpoint", METHODS)
def test_a_listed_layer_is_built_and_its_weights_are_loaded(build, checkpoint):
    method, kernel = METHODS[checkpoint]
    made = build(checkpoint, kernel=kernel)
    assert [type(one).__name__ for one in made] == [method] * quantised_checkpoints.LAYERS
    assert all(one.supports_eplb and one.moe_kernel is not None for one in made)


@pytest.mark.parametrize("checkpoint", METHODS)
def test_an_unlisted_layer_is_refused_with_the_reason(build, checkpoint):
    with pytest.raises(ConfigurationError) as caught:
        build(checkpoint)
    method, _ = METHODS[checkpoint]
    assert "layer 'model.layers.0.mlp.experts" in caught.value.reason
    assert f"({method} with ReferenceExperts): never read" in caught.value.reason
    assert "--moe-backend" in caught.value.remedy
    assert "quantisation.unlisted=self_test" in caught.value.remedy


@pytest.mark.parametrize("checkpoint", METHODS)
def test_an_unlisted_layer_is_built_where_it_is_to_be_tried(build, checkpoint):
    assert all(one.supports_eplb for one in build(checkpoint, TRIED))


def test_a_kernel_that_cannot_be_right_is_refused_even_if_it_may_be_tried(build):
    with pytest.raises(ConfigurationError, match="routes tokens by itself"):
        build("ct_int8", TRIED, kernel="TrtLlmMxint4ExpertsMonolithic")


def test_layers_that_vllm_builds_are_left_as_they_are(build):
    made = build("fp8_block", kernel="NoExperts")
    assert all(one.supports_eplb for one in made)
    assert not any(map(marked, made))


def test_without_a_balancer_nothing_is_asked(build):
    """As in mode observe."""
    made = build("ct_int8", balanced=False)
    assert not any(one.supports_eplb for one in made)


def test_other_layers_of_the_class_are_not_spoken_for(build):
    """A method is let balance by itself: another one of its class may have another kernel."""
    lifted = build("ct_int8", kernel="TritonExperts")
    others = build("ct_int8", balanced=False)
    assert all(one.supports_eplb for one in lifted)
    assert not any(one.supports_eplb for one in others)


def marked(method):
    return vars(method).get(quantised_layers._LIFTED)


@pytest.mark.parametrize("unlisted", ["refuse", "self_test"])
def test_what_is_lifted_is_what_is_listed_or_to_be_tried(unlisted):
    setting = QuantisationConfig(unlisted=unlisted)
    assert lifts(pair_of("CompressedTensorsWNA16MoEMethod", "MarlinExperts"), setting)
    assert not lifts(pair_of("GptOssMxfp4MoEMethod", "MarlinExperts"), setting)
    unread = pair_of("CompressedTensorsWNA16MoEMethod", "HummingGroupedExperts")
    assert lifts(unread, setting) == (unlisted == "self_test")
