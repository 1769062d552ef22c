"""Rows that are padding: nothing is sent for them, and they come back as zeros, whatever they hold.

vLLM marks graph padding and the rows of idle data-parallel ranks by ids of -1.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from padded_steps import TOP_K, is_padding, with_padding
from ranks import Ranks
from routed_steps import HIDDEN, WAYS, make_step, placements, through_experts
from step_path import DEVICE, recording_waits
from torch.testing._internal.distributed.fake_pg import FakeStore

from ep_rebalance.all_to_all import FixedCapacity, fixed_capacity

TOKENS_R = [9, 5, 1, 17]
PADDED = ["last rows", "single pairs", "an idle rank", "all ranks idle"]
CASES = [
    *(
        (way, size)
        for way in WAYS
        if way not in ("room for most", "room for one")
        for size in (1, 2, 4)
    ),
    ("nodes of 2", 4),
]


def forward_with_padding(rank, size, way, combine, padded):
    """For each placement: output, reference, and how many pairs were computed and are no padding."""
    answers = []
    for experts_of_rank in placements(size):
        step = make_step(rank, TOKENS_R[rank], TOP_K, torch.float32, experts_of_rank, 12, seed=0)
        step = with_padding(step, is_padding(padded, rank, TOKENS_R[rank]))
        out_TH, expected, _, computed = through_experts(rank, way, combine, step, experts_of_rank)
        answers.append((out_TH, expected, computed, int((step.slots_TK >= 0).sum())))
    return answers


@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize(("way", "size"), CASES)
def test_padding_comes_back_as_zeros_and_changes_no_other_row(
    ranks_of: dict[int, Ranks], way, size, padded, combine
):
    by_rank = ranks_of[size].run(forward_with_padding, size, way, combine, padded)
    for placed in zip(*by_rank, strict=True):
        for out_TH, expected, _, _ in placed:
            if combine == "exact":
                assert torch.equal(out_TH, expected)
            else:
                torch.testing.assert_close(out_TH, expected, rtol=1e-5, atol=1e-5)
        assert sum(computed for _, _, computed, _ in placed) == sum(real for *_, real in placed)


def plan_of_padded_step(rank):
    """How FixedCapacity sends 8 tokens of rank 0 that are half padding."""
    all_to_all = FixedCapacity(
        group=dist.group.WORLD, slots_per_rank=2, combine="exact", capacity_factor=1.0
    )
    slots_TK = torch.tensor([[-1], [2]] * 4 if rank == 0 else [[-1]] * 16)
    sent = all_to_all.dispatch(
        torch.ones(len(slots_TK), HIDDEN), slots_TK, torch.ones(slots_TK.shape)
    )
    return sent.handle.plan.rounds, sent.handle.plan.capacity


def test_padding_takes_no_room(two_ranks: Ranks):
    assert two_ranks.run(plan_of_padded_step) == [(2, 2)] * 2


@pytest.fixture
def group_on_device() -> Iterator[None]:
    """Of four ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("combine", ["exact", "fast"])
def test_fixed_capacity_reads_nothing_on_the_host_while_a_graph_is_captured(
    group_on_device: None, monkeypatch: pytest.MonkeyPatch, combine
):
    monkeypatch.setattr(fixed_capacity, "_is_captured", lambda tensor: True)
    with recording_waits() as waits:
        all_to_all = FixedCapacity(
            group=dist.group.WORLD, slots_per_rank=3, combine=combine, capacity_factor=0.5
        )
        hidden_TH = torch.empty(8, HIDDEN, device=DEVICE)
        slots_TK = torch.empty(8, TOP_K, dtype=torch.int32, device=DEVICE)
        sent = all_to_all.dispatch(hidden_TH, slots_TK, torch.empty(8, TOP_K, device=DEVICE))
        outputs_NH = torch.empty(len(sent.local_slots_N), HIDDEN, device=DEVICE)
        all_to_all.combine(sent, outputs_NH, torch.empty_like(hidden_TH))
    assert waits == []
