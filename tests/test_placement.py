from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_rebalance.placement import REPLICA_BOUND, Placement, PlacementError, imbalance_L


def test_contiguous_is_what_vllm_loads() -> None:
    placement = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=3, num_redundant=2)
    assert placement.slots_LP.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert (placement.num_slots, placement.slots_per_rank, placement.num_redundant) == (6, 2, 2)
    assert placement.max_replicas == 3


def test_round_robin_deals_experts_out_to_the_ranks() -> None:
    placement = Placement.round_robin(num_layers=1, num_experts=6, num_ranks=2)
    assert placement.slots_LP.tolist() == [[0, 2, 4, 1, 3, 5]]


@pytest.mark.parametrize(
    ("slots", "num_experts", "num_ranks", "message"),
    [
        ([0, 1, 2, 3], 4, 2, "must be"),
        ([[0, 1, 2]], 3, 2, "evenly"),
        ([[0, 1, 2, 4]], 4, 2, "0..3"),
        ([[0, -1, 1, 2]], 3, 2, "0..2"),
        ([[0, 1, 2, 1]], 4, 2, "no slot holds expert 3"),
        ([[0, 1, 2, 3], [0, 0, 1, 2]], 4, 2, "layer 1"),
        ([[0, 0, 1, 2]], 3, 2, "rank 0 holds expert 0 twice"),
    ],
)
def test_what_is_no_placement_is_refused(
    slots: list[object], num_experts: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(np.array(slots, dtype=np.int32), num_experts, num_ranks)


def test_an_expert_has_no_more_replicas_than_tables_have_columns() -> None:
    """On 1,024 ranks of two slots, 256 experts have eight replicas each on average."""
    sizes = {"num_layers": 1, "num_experts": 256, "num_ranks": 1024, "num_redundant": 1792}
    placement = Placement.contiguous(**sizes)
    assert placement.max_replicas == REPLICA_BOUND == 64
    slots_P = placement.slots_LP[0].copy()
    lacking = [r for r in range(1024) if 0 not in slots_P[2 * r : 2 * r + 2]]
    slots_P[2 * np.array(lacking[: 64 - 8])] = 0
    assert Placement(slots_P[None], 256, 1024).replica_counts_LE()[0, 0] == 64
    slots_P[2 * lacking[64 - 8]] = 0
    with pytest.raises(PlacementError, match="layer 0: 65 slots hold expert 0, and 64 may"):
        Placement(slots_P[None], 256, 1024)


def test_few_experts_on_many_ranks_may_have_twice_as_many_replicas_as_they_must() -> None:
    sizes = {"num_layers": 1, "num_experts": 8, "num_ranks": 512, "num_redundant": 504}
    assert Placement.contiguous(**sizes).max_replicas == 128


def test_slots_are_copied_and_read_only() -> None:
    slots_LP = np.array([[0, 1]], dtype=np.int32)
    placement = Placement(slots_LP, 2, 2)
    slots_LP[0, 0] = 1
    assert placement.slots_LP[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.slots_LP[0, 0] = 1


def test_replicas() -> None:
    placement = Placement(np.array([[0, 1, 2, 0, 1, 3]], dtype=np.int32), 4, 2)
    assert placement.replica_counts_LE().tolist() == [[2, 2, 1, 1]]
    assert placement.replica_slots(0).tolist() == [[0, 3], [1, 4], [2, -1], [5, -1]]
    assert placement.even_quotas_LP().tolist() == [[0.5, 0.5, 1, 0.5, 0.5, 1]]


def test_rank_load_follows_quotas() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), 3, 2)
    load_LE = np.array([[4, 1, 3]])
    assert placement.rank_load_LR(load_LE).tolist() == [[3, 5]]
    assert placement.rank_load_LR(load_LE, np.array([[0.75, 1, 0.25, 1]])).tolist() == [[4, 4]]


def test_replaced_takes_only_the_layers_asked_for() -> None:
    first = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
    second = Placement(first.slots_LP[:, ::-1], 4, 2)
    mixed = first.replaced([1], second)
    assert mixed.slots_LP.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert (mixed.changed_slots(first), first.changed_slots(first)) == (4, 0)
    assert mixed != first
    assert mixed == first.replaced([1], second)


def test_imbalance_of_a_layer_without_tokens_is_even() -> None:
    assert imbalance_L(np.array([[0.0, 0.0], [3.0, 1.0]])).tolist() == [1.0, 1.5]


@given(ranks=st.integers(1, 6), experts=st.integers(2, 24), redundant=st.integers(0, 12))
def test_rank_load_keeps_every_token(ranks: int, experts: int, redundant: int) -> None:
    if (experts + redundant) % ranks or redundant > experts * (ranks - 1):
        return
    try:
        placement = Placement.contiguous(
            num_layers=1, num_experts=experts, num_ranks=ranks, num_redundant=redundant
        )
    except PlacementError:
        return
    load_LE = np.arange(experts)[None]
    assert placement.rank_load_LR(load_LE).sum() == pytest.approx(load_LE.sum())
