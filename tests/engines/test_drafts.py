"""MoE layers that are not balanced route as they were loaded, and vLLM's check of their state passes."""

from types import SimpleNamespace

import pytest
import torch


class Layer:
    """A layer with vLLM's own router, as `enable_eplb` builds it."""

    def __init__(self, moe_router):
        self.router = moe_router


@pytest.fixture
def moe_router(vllm):
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    return FusedTopKRouter(top_k=2, global_num_experts=6, eplb_state=EplbLayerState())


def test_a_router_without_state_does_not_route(moe_router):
    with pytest.raises(ValueError, match="EPLB requires"):
        moe_router._validate_eplb_state()


def test_left_in_place_ids_pass_and_the_check_is_satisfied(moe_router, monkeypatch):
    from ep_rebalance.engines.vllm.seams import drafts, router

    listed = Layer(None)
    monkeypatch.setattr(drafts, "moe_layers_of", lambda model: [listed, Layer(moe_router)])
    assert drafts.leave_in_place(None, torch.device("cpu"), listed=(listed,)) == 1
    moe_router._validate_eplb_state()
    ids_TK = torch.tensor([[0, 5], [-1, 3]])
    assert torch.equal(getattr(moe_router, router._ATTRIBUTE)(ids_TK), ids_TK)


class Wrapper:
    """As vLLM wraps a model for CUDA graphs: no module, and it has what it wraps."""

    def __init__(self, model):
        self._model = model

    def unwrap(self):
        return self._model


@pytest.mark.parametrize("name", ["drafter", "speculator"])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper])
def test_a_drafter_is_found_in_either_runner_with_or_without_graphs(vllm, name, wrap):
    from ep_rebalance.engines.vllm.seams.drafts import find_drafter

    model = torch.nn.Linear(1, 1)
    proposer = SimpleNamespace(model=wrap(model))
    found = find_drafter(SimpleNamespace(**{name: proposer}))
    assert found.proposer is proposer
    assert found.model is model


def test_no_drafter_is_found_where_there_is_none(vllm):
    from ep_rebalance.engines.vllm.seams.drafts import find_drafter

    assert find_drafter(SimpleNamespace(speculator=None)) is None
    assert find_drafter(SimpleNamespace(drafter=object())) is None
