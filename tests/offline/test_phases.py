"""What redundant experts do to decode and to prefill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from traces import head_of

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.offline.phases import PhaseStep, phase_steps
from ep_rebalance.offline.run import Scenario
from ep_rebalance.offline.step_time import Hardware, ModelledSteps
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_planner")

LAYERS, EXPERTS, STEPS = 2, 8, 10
HEAD = head_of(layers=LAYERS, experts=EXPERTS, ranks=2, redundant=2)
# An expert has 100 bytes and parameters: it is read in 1 s, in which it computes 50 tokens.
HARDWARE = Hardware(
    memory_bytes_per_second=100.0,
    flops_per_second=10_000.0,
    intranode=1.0,
    internode=1.0,
    memory_bytes=1.0,
)


def steps_of(
    decode_E: list[float], prefill_E: list[float], redundant: int = 2, **settings: object
) -> dict[str, PhaseStep]:
    """By phase, for so many tokens of each expert in each of the steps."""
    phases_ALE = np.array([[prefill_E] * LAYERS, [decode_E] * LAYERS])
    mean = RecordedSnapshot(
        counts_ALE=(STEPS * phases_ALE).astype(np.int64),
        step=STEPS,
        steps=STEPS,
        step_seconds=0.0,
        time=0.0,
        generation=0,
    )
    topology = Topology.single_node(2)
    times = ModelledSteps(
        hardware=HARDWARE,
        topology=topology,
        expert_bytes_L=(100,) * LAYERS,
        bytes_per_parameter=1.0,
        hidden_size=1,
        top_k=HEAD.top_k,
        fraction=0.5,
    )
    one = Scenario(
        policy="ours",
        planner=None,
        config=load_config({"planner": {"redundant_experts": redundant}} | settings),
        topology=topology,
        step_time=times,
    )
    return {step.phase: step for step in phase_steps(HEAD, mean, one)}


def test_redundant_experts_are_read_in_decode_in_vain_and_even_out_prefill() -> None:
    """The hottest expert has half of the tokens, so without a copy of it one rank gets half or more."""
    steps = steps_of([20.0] + [10.0] * 7, [2800.0] + [400.0] * 7)
    decode, prefill = steps["decode"], steps["prefill"]
    # Four experts a rank in two layers, and five with a copy.
    assert decode.mostly_reads
    assert decode.reading_seconds == pytest.approx(LAYERS * 4, rel=1e-3)
    assert decode.single_seconds == pytest.approx(LAYERS * 4, rel=1e-3)
    assert decode.expert_seconds == pytest.approx(LAYERS * 5, rel=1e-2)
    assert decode.longer == pytest.approx(0.25, abs=0.01)
    assert "experts take 25.0% longer with 1 copies a GPU" in replace(
        decode, expert_seconds=10.0, single_seconds=8.0
    ).sentence(1)
    assert not prefill.mostly_reads
    assert prefill.computing_seconds == pytest.approx(LAYERS * 5600 / 50 / 2)
    assert prefill.single_seconds == pytest.approx(LAYERS * (2800 + 3 * 400) / 50)
    assert prefill.expert_seconds == pytest.approx(LAYERS * 2800 / 50, rel=0.05)
    assert prefill.longer < -0.25


def test_with_one_active_replica_decode_does_not_pay_for_copies() -> None:
    hardware = {
        "memory_bytes_per_second": 100.0,
        "flops_per_second": 10_000.0,
        "bytes_per_parameter": 1.0,
    }
    decode_E = [20.0] + [10.0] * 7
    by_time = {"planner": {"redundant_experts": 2, "objective": "time"}, "hardware": hardware}
    decode = steps_of(decode_E, [0.0] * 8, **by_time)["decode"]
    assert decode.longer == pytest.approx(0.0, abs=0.01)
    spread = {"dispatch": {"split": "own_counts"}}
    assert steps_of(decode_E, [0.0] * 8, **spread)["decode"].longer > 0.2


def test_a_phase_without_tokens_is_left_out_and_without_copies_nothing_is_compared() -> None:
    (decode,) = steps_of([1.0] * 8, [0.0] * 8, redundant=0).values()
    assert decode.phase == "decode"
    assert decode.longer == 0.0
    assert decode.tokens_per_rank == pytest.approx(8 / HEAD.top_k / 2)
    assert "copies" not in decode.sentence(0)
