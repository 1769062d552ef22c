from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_rebalance.planning.alignment import align


def test_experts_that_stay_keep_their_slots() -> None:
    current = np.array([0, 1, 2, 3, 4, 5], dtype=np.int32)
    target = np.array([2, 5, 0, 1, 4, 3], dtype=np.int32)
    assert align(target, current, 2).tolist() == [0, 5, 2, 3, 4, 1]


def test_layers_are_aligned_one_by_one() -> None:
    current = np.array([[0, 1], [1, 0]], dtype=np.int32)
    assert align(current[::-1], current, 1).tolist() == current.tolist()


def test_shapes_must_agree() -> None:
    slots = np.array([0, 1, 2, 3], dtype=np.int32)
    with pytest.raises(ValueError, match="3 ranks"):
        align(slots, slots, 3)
    with pytest.raises(ValueError, match="cannot align"):
        align(slots[:2], slots, 2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 6))
def test_ranks_keep_their_experts_and_move_only_arrivals(seed: int, ranks: int, slots: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [generator.choice(9, slots, replace=False) for _ in range(2 * ranks)]
    target, current = np.array(rows, dtype=np.int32).reshape(2, ranks * slots)
    aligned_RS = align(target, current, ranks).reshape(ranks, slots)
    for rank in range(ranks):
        wanted = target.reshape(ranks, slots)[rank]
        held = current.reshape(ranks, slots)[rank]
        assert sorted(aligned_RS[rank]) == sorted(wanted)
        assert np.count_nonzero(aligned_RS[rank] != held) == len(set(wanted) - set(held))
