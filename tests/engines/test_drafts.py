"""MoE layers that are not balanced route as they were loaded, and vLLM's check of their state passes."""

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
    from ep_rebalance.engines.vllm import drafts, router

    listed = Layer(None)
    monkeypatch.setattr(drafts, "_moe_layers", lambda model: [listed, Layer(moe_router)])
    assert drafts.leave_in_place(None, torch.device("cpu"), listed=(listed,)) == 1
    moe_router._validate_eplb_state()
    ids_TK = torch.tensor([[0, 5], [-1, 3]])
    assert torch.equal(getattr(moe_router, router._ATTRIBUTE)(ids_TK), ids_TK)
