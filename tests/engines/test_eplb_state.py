"""vLLM's own classes work with what stands in the place of its balancer."""

from types import SimpleNamespace

import pytest
import torch

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.vllm.contract import StandInContract

CONTROLLER = "vllm.v1.worker.gpu.eplb_utils:EPLBController"


@pytest.fixture
def controller(vllm, monkeypatch):
    """A V2 runner's controller, as it is after `load_model`."""
    from vllm.v1.worker.gpu import eplb_utils

    from ep_rebalance.engines.vllm.seams.eplb_state import VacantEplbState

    monkeypatch.setattr(eplb_utils, "EplbState", VacantEplbState)
    settings = SimpleNamespace(log_balancedness=False)
    parallel = SimpleNamespace(enable_eplb=True, eplb_config=settings)
    controller = eplb_utils.EPLBController(parallel, torch.device("cpu"))
    controller.prepare_load()
    return controller


def test_warm_up_suppresses_the_stand_in_and_releases_it(controller):
    if not hasattr(controller, "suppress"):
        pytest.skip("vLLM 0.32 has no suppress")
    with controller.suppress():
        assert controller.suppressed
        assert not controller.state.should_record_tensor
    assert not controller.suppressed


def test_every_step_and_forward_of_the_controller_finds_its_answer(controller):
    controller._has_registered_models = True
    controller.step()
    controller.step(is_dummy=True, is_profile=True)
    controller.prepare_forward(None, 3)
    controller.maybe_start_async_loop(True)


class Incomplete:
    is_async = False


def test_a_stand_in_that_lacks_what_is_asked_for_is_refused(vllm):
    contract = StandInContract(CONTROLLER, "state", Incomplete)
    assert {"step", "prepare_forward"} <= contract.asked()
    with pytest.raises(ConfigurationError, match="which ours lacks") as raised:
        contract.check()
    assert "prepare_forward" in raised.value.reason
    assert "is_async" not in raised.value.reason
