from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.config import MigrationConfig
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace, Transport, layers_by_gain, most_bytes_per_step
from ep_rebalance.planning.problem import Plan
from ep_rebalance.topology import Topology

CURRENT = Placement.contiguous(num_layers=4, num_experts=8, num_ranks=2)
EXPERT_BYTES = 44 << 20
MIB = 1 << 20


def plan(*gain_L: float, moved_L: tuple[int, ...] = (2, 2, 2, 2)) -> Plan:
    """Of each layer the imbalance that it saves, and how many slots it changes."""
    slots_LP = CURRENT.slots_LP.copy()
    for slots_P, moved in zip(slots_LP, moved_L, strict=True):
        slots_P[: moved // 2], slots_P[4 : 4 + moved // 2] = (
            slots_P[4 : 4 + moved // 2].copy(),
            slots_P[: moved // 2].copy(),
        )
    target = Placement(slots_LP, 8, 2)
    return Plan(
        placement=target,
        quotas_LP=target.even_quotas_LP(),
        unmoved_quotas_LP=CURRENT.even_quotas_LP(),
        imbalance_before_L=np.full(4, 2.0),
        imbalance_after_L=2.0 - np.array(gain_L),
        moved_slots=sum(moved_L),
    )


def pace(
    gain: float,
    *,
    setting: int | str = "auto",
    step_seconds: float = 0.02,
    expert_bytes: int = EXPERT_BYTES,
    near: float = 300e9,
) -> Pace:
    transport = Transport(
        settings=MigrationConfig.model_validate({"max_bytes_per_step": setting}),
        topology=Topology(node_of_rank=(0, 1), bytes_per_second=(2e12, near, 45e9)),
        expert_bytes_L=(expert_bytes,) * 4,
        step_seconds=step_seconds,
    )
    return transport.pace(plan(0.1, 0.4, 0.2, 0.3), CURRENT, gain)


def test_a_step_is_lengthened_by_a_hundredth_over_each_kind_of_link() -> None:
    usual = pace(0.001)
    assert (usual.max_bytes, usual.max_internode_bytes) == (60_000_000, 9_000_000)
    assert not usual.hurried


def test_a_step_is_lengthened_by_what_the_plan_saves_up_to_a_twentieth() -> None:
    assert pace(0.03).max_internode_bytes == 27_000_000
    assert not pace(0.03).hurried
    assert pace(0.4).max_internode_bytes == 45_000_000
    assert pace(0.4).hurried


def test_no_step_carries_more_than_two_experts() -> None:
    assert pace(0.4).max_bytes == 2 * EXPERT_BYTES == most_bytes_per_step("auto", [EXPERT_BYTES, 7])


@pytest.mark.parametrize("step_seconds", [0.0, 1e-6])
def test_short_or_unknown_steps_carry_a_mebibyte(step_seconds: float) -> None:
    usual = pace(0.001, step_seconds=step_seconds)
    assert (usual.max_bytes, usual.max_internode_bytes) == (MIB, MIB)


def test_what_is_no_number_is_paced_as_usual_and_endless_links_carry_two_experts() -> None:
    assert pace(float("nan")) == pace(0.0)
    assert pace(0.4, step_seconds=1e3, near=1e308).max_bytes == 2 * EXPERT_BYTES


def test_of_tiny_experts_a_step_carries_a_mebibyte() -> None:
    assert pace(0.4, expert_bytes=1000).max_bytes == MIB == most_bytes_per_step("auto", [1000])


def test_a_number_holds_for_all_links_and_gains() -> None:
    for gain in (0.0, 0.4):
        fixed = pace(gain, setting=5000)
        assert (fixed.max_bytes, fixed.max_internode_bytes) == (5000, 5000)
    assert most_bytes_per_step(5000, [EXPERT_BYTES]) == 5000


def test_layers_that_save_most_for_each_byte_come_first() -> None:
    assert pace(0.1).layers == (1, 3, 2, 0)
    some = plan(0.1, 0.4, 0.2, 0.3, moved_L=(2, 4, 0, 2))
    assert layers_by_gain(some, CURRENT, [100, 100, 100, 400]) == (1, 0, 3)
