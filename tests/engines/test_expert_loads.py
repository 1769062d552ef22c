"""Which layers were loaded, told by vLLM's own loader of experts."""

import pytest


@pytest.fixture
def loads(vllm):
    """Two layers that were loaded once, and vLLM's loader with the seam around it."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from ep_rebalance.engines.vllm.seams import expert_loads

    experts = [object.__new__(RoutedExperts) for _ in range(2)]
    layers = [type("Layer", (), {"routed_experts": one})() for one in experts]
    for one in experts:
        object.__setattr__(one, "_parameters", {})
        object.__setattr__(one, "_buffers", {})
        object.__setattr__(one, "_modules", {})

    def load(layer):
        expert_loads._count(lambda *_: None, experts[layer])

    return expert_loads.ExpertLoads, layers, load


def test_layers_are_told_once_after_each_load(loads):
    watch, layers, load = loads
    for layer in (0, 1):
        load(layer)
    watched = watch(layers)
    assert watched.complete
    assert watched.written() == ()
    load(1)
    load(1)
    assert watched.written() == (1,)
    assert watched.written() == ()


def test_a_model_that_loads_elsewhere_does_not_tell(loads):
    watch, layers, load = loads
    load(0)
    assert not watch(layers).complete


def test_what_other_models_load_is_not_theirs(loads):
    watch, layers, load = loads
    for layer in (0, 1):
        load(layer)
    target = watch(layers[:1])
    load(1)
    assert target.written() == ()


def test_slots_that_the_loader_left_out_are_known(vllm):
    from ep_rebalance.engines.vllm.seams import expert_loads

    experts = type("Experts", (), {})()
    assert not expert_loads.left_out(experts, range(2))  # another loader may have written it
    expert_loads._count(lambda *_: None, experts, "w2", 0.0, "w2_weight", "w2", 0)
    assert not expert_loads.left_out(experts, range(1))
    assert expert_loads.left_out(experts, range(2))
    expert_loads._count(lambda *_, **__: None, experts, "w2", 0.0, expert_id=1)
    assert not expert_loads.left_out(experts, range(2))
