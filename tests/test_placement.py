from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import SEEDS, placements

from ep_rebalance.placement import (
    REPLICA_BOUND,
    Placement,
    PlacementError,
    can_be_shared,
    first_slots_R1,
    imbalance_L,
)


def test_contiguous_is_what_vllm_loads() -> None:
    placement = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=3, num_redundant=2)
    assert placement.slots_LP.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert (placement.num_slots, placement.slots_per_rank, placement.num_redundant) == (6, 2, 2)
    assert placement.max_replicas == 3


def test_round_robin_deals_experts_out_to_the_ranks() -> None:
    placement = Placement.round_robin(num_layers=1, num_experts=6, num_ranks=2)
    assert placement.slots_LP.tolist() == [[0, 2, 4, 1, 3, 5]]
    uneven = Placement.round_robin(num_layers=1, num_experts=7, num_ranks=3)
    assert uneven.slots_LP.tolist() == [[0, 3, 6, 1, 4, 2, 5]]


@pytest.mark.parametrize(
    ("slots", "num_experts", "num_ranks", "message"),
    [
        ([0, 1, 2, 3], 4, 2, "must be"),
        ([[0, 1, 2, 0, 1]], 3, 2, "evenly"),
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


# --- ranks that have unequally many slots


@given(slots=st.integers(1, 40), ranks=st.integers(1, 12))
def test_every_slot_is_on_one_rank_and_the_first_ranks_have_what_is_left_over(
    slots: int, ranks: int
) -> None:
    first_R1 = first_slots_R1(slots, ranks)
    counts_R = np.diff(first_R1)
    assert (first_R1[0], first_R1[-1], len(counts_R)) == (0, slots, ranks)
    assert (np.sort(counts_R)[::-1] == counts_R).all()
    assert counts_R.max() - counts_R.min() <= 1
    if slots % ranks == 0:
        assert (first_R1 == np.arange(ranks + 1) * (slots // ranks)).all()


@given(experts=st.integers(1, 40), ranks=st.integers(1, 12), dealt=st.booleans(), seed=SEEDS)
def test_a_rank_has_the_load_of_the_experts_that_it_holds(
    experts: int, ranks: int, dealt: bool, seed: int
) -> None:
    make = Placement.round_robin if dealt else Placement.contiguous
    placement = make(num_layers=2, num_experts=experts, num_ranks=ranks)
    load_NLE = np.random.default_rng(seed).integers(0, 1000, (3, 2, experts))
    load_NLR = placement.rank_load_LR(load_NLE)
    held = [
        placement.slots_LP[0, placement.rank_of(np.arange(experts)) == rank]
        for rank in range(ranks)
    ]
    assert sorted(np.concatenate(held)) == list(range(experts))
    expected = np.stack([load_NLE[..., own].sum(-1) for own in held], axis=-1)
    assert (load_NLR == expected).all()
    assert (load_NLR.sum(-1) == load_NLE.sum(-1)).all()


@given(placements())
def test_sums_over_equal_ranks_are_what_they_were(placement: Placement) -> None:
    """To the last bit."""
    values_LP = np.random.default_rng(0).random((3, *placement.slots_LP.shape))
    by_rank = values_LP.reshape(*values_LP.shape[:-1], placement.num_ranks, -1)
    assert (placement.rank_sums_LR(values_LP) == by_rank.sum(-1)).all()


def test_only_slots_without_redundant_ones_may_be_left_over() -> None:
    assert [can_be_shared(slots, 5, 2) for slots in (4, 5, 6, 7)] == [True, True, True, False]
    assert not can_be_shared(5, 5, 0)
    uneven = Placement.contiguous(num_layers=1, num_experts=5, num_ranks=2)
    assert uneven.max_replicas == 1
    with pytest.raises(PlacementError, match="5 slots cannot be shared evenly by 2 ranks") as no:
        _ = uneven.slots_per_rank
    assert "redundant experts make them even" in str(no.value)
