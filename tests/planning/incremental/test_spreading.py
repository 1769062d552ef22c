from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SEEDS, placements

from ep_rebalance.placement import Placement
from ep_rebalance.planning.incremental.spreading import spread_replicas


def spread(slots: list[int], load: list[float], num_ranks: int) -> list[list[int]]:
    """The experts of each rank; raises if that is no placement."""
    slots_P = np.array(slots)
    spread_replicas(slots_P, np.array(load, dtype=np.float64), num_ranks)
    placement = Placement(slots_P[None].astype(np.int32), len(load), num_ranks)
    return placement.slots_LP.reshape(num_ranks, -1).tolist()


@st.composite
def heaps(draw: st.DrawFn) -> tuple[list[int], list[float], int]:
    """Slots that hold every expert somewhere, and the rest of them any expert or one alone."""
    ranks, slots_per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    slots = ranks * slots_per_rank
    experts = draw(st.integers(slots_per_rank, slots))
    some = draw(st.sampled_from([1, experts]))
    more = draw(
        st.lists(st.integers(0, some - 1), min_size=slots - experts, max_size=slots - experts)
    )
    load = draw(st.lists(st.sampled_from([0.0, 1, 5, 90]), min_size=experts, max_size=experts))
    return draw(st.permutations([*range(experts), *more])), load, ranks


@given(heaps())
@settings(max_examples=300)
def test_the_result_is_a_placement(heap: tuple[list[int], list[float], int]) -> None:
    spread(*heap)


@given(placements(max_layers=1), SEEDS)
@settings(max_examples=50)
def test_a_placement_stays(placement: Placement, seed: int) -> None:
    load_E = np.random.default_rng(seed).random(placement.num_experts)
    held = spread(placement.slots_LP[0].tolist(), load_E.tolist(), placement.num_ranks)
    assert np.ravel(held).tolist() == placement.slots_LP[0].tolist()


def test_the_second_replica_goes_for_the_expert_nearest_in_load() -> None:
    assert spread([0, 0, 1, 2], [10, 6, 1], 2) == [[0, 1], [0, 2]]


def test_more_replicas_than_ranks_make_room_for_the_hottest_that_the_rank_lacks() -> None:
    """All load on one expert: it gets every redundant slot, and there are more than ranks."""
    assert spread([0, 0, 0, 1, 2, 3], [100, 0, 5, 9], 2) == [[0, 3, 2], [1, 2, 0]]
