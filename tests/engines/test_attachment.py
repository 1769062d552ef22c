"""What the layers of a loaded model say, and what of it cannot be served."""

from types import SimpleNamespace

import pytest

from ep_rebalance.config import ConfigurationError


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
    return SimpleNamespace(moe_layers=layers, num_moe_layers=len(layers), num_logical_experts=4)


@pytest.fixture
def attachment(vllm, monkeypatch):
    from ep_rebalance.engines.vllm.seams import attachment

    group = SimpleNamespace(world_size=2, rank_in_group=1)
    monkeypatch.setattr(attachment, "_tensor_group", lambda: group)
    monkeypatch.setattr(attachment, "ep_group", lambda: group)
    return attachment


def test_tensor_parallel_ranks_share_tokens_unless_the_layers_split_them(attachment):
    assert attachment._tokens_are_shared(model(layer(), layer()))
    assert not attachment._tokens_are_shared(model(layer(split=True)))
    attachment._tensor_group().world_size = 1
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
