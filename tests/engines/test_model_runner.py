"""When a step begins and ends, on vLLM's own runner classes with what they need for that and no more."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from ep_rebalance.kernels.shared_arithmetic import DECODE, PREFILL


@dataclass
class Calls:
    """In the place of an attachment and its session: what they were told."""

    steps: list = field(default_factory=list)
    busy: bool = False

    @property
    def sessions(self):
        return self

    def begin_step(self, phases_T, tokens_R, *, started, continues):
        self.busy = True
        self.requests = tokens_R.tolist()
        self.steps.append((phases_T.tolist(), continues))

    def end_step(self):
        self.busy = False
        self.steps.append("end")


def scheduled(*cached):
    return SimpleNamespace(scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached)))


@pytest.fixture
def seam(vllm):
    from ep_rebalance.engines.vllm.seams import model_runner

    return model_runner


@pytest.fixture
def v2(vllm, seam):
    """A V2 runner with its real controller."""
    from vllm.v1.worker.gpu.eplb_utils import EPLBController
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.eplb = EPLBController(SimpleNamespace(enable_eplb=True), None)
    runner.ep_rebalance = runner.eplb.ep_rebalance = Calls()
    return runner


@pytest.fixture
def v1(vllm):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.ep_rebalance = Calls()
    return runner


def _wrapped(seam, runner, name, original):
    """What the seam makes of a method of the runner's class, were that `original`."""
    made = []

    def wrap(owner, attribute, wrapper):
        if owner is type(runner) and attribute == name:
            made.append(lambda *args: wrapper(original, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seam, "wrap", wrap)
        seam.install()
    return made[0] if made else original


def batch(num_tokens):
    """Two requests, three prompt tokens and one decode token, padded to `num_tokens` and more."""
    return SimpleNamespace(
        is_prefilling_np=np.array([True, False]),
        num_scheduled_tokens=np.array([3, 1]),
        num_tokens=num_tokens,
    )


def test_v2_marks_the_tokens_of_a_step(seam, v2):
    result = seam._mark_tokens_v2(lambda *_: batch(4), v2, scheduled("a"))
    assert result.num_tokens == 4
    assert v2.ep_rebalance.steps == [([PREFILL] * 3 + [DECODE], True)]


def test_v2_marks_and_ends_no_step_that_warms_kernels_up(seam, v2):
    v2.eplb.suppressed = True
    seam._mark_tokens_v2(lambda *_: batch(4), v2, scheduled())
    seam._step_v2(None, v2.eplb)
    assert v2.ep_rebalance.steps == []


def test_v2_ends_every_other_step_once(seam, v2):
    seam._step_v2(None, v2.eplb, is_dummy=True)
    seam._step_v2(None, v2.eplb, is_dummy=True, is_profile=True)
    seam._step_v2(None, v2.eplb)
    assert v2.ep_rebalance.steps == ["end", "end"]


def test_v1_ends_a_busy_step_after_the_copy_of_its_tokens_was_ordered(seam, v1):
    calls = v1.ep_rebalance

    def sample_tokens(runner):
        seam._step_v1(None, runner)
        calls.steps.append("copy ordered")

    calls.busy = True
    seam._end_busy_step_v1(sample_tokens, v1)
    assert calls.steps == ["copy ordered", "end"]


@pytest.mark.parametrize("output", ["pooled", "tensors for the next pipeline stage"])
def test_v1_ends_a_step_of_a_pooling_model_in_every_stage(seam, v1, output):
    v1.is_pooling_model = True
    v1.ep_rebalance.busy = True
    wrapped = _wrapped(seam, v1, "execute_model", lambda runner: output)
    assert wrapped(v1) == output
    assert v1.ep_rebalance.steps == ["end"]


def test_v1_does_not_end_a_step_before_its_tokens_are_sampled(seam, v1):
    v1.is_pooling_model = False
    v1.ep_rebalance.busy = True
    _wrapped(seam, v1, "execute_model", lambda runner: None)(v1)
    assert v1.ep_rebalance.steps == []
    _wrapped(seam, v1, "sample_tokens", lambda runner: None)(v1)
    assert v1.ep_rebalance.steps == ["end"]


def test_v1_ends_dummy_steps_at_once_and_profile_steps_never(seam, v1):
    seam._step_v1(None, v1, is_dummy=True)
    seam._step_v1(None, v1, is_dummy=True, is_profile=True)
    seam._end_busy_step_v1(lambda runner: None, v1)
    assert v1.ep_rebalance.steps == ["end"]
