"""One active replica for each expert, where reading weights takes longest."""

from __future__ import annotations

import numpy as np
import pytest
from shapes import random_placement

from ep_rebalance.placement import Placement
from ep_rebalance.planning.active_replicas import concentrate
from ep_rebalance.planning.quotas import split_quotas


def placed(*experts_of_ranks: tuple[int, ...]) -> Placement:
    slots_P = np.array(experts_of_ranks, dtype=np.int32).reshape(-1)
    return Placement(slots_P[None], int(slots_P.max()) + 1, len(experts_of_ranks))


def concentrated(placement: Placement, tokens_E: list[float], reading: float) -> list[float]:
    tokens_LE = np.array([tokens_E], dtype=np.float64)
    quotas_LP = split_quotas(placement, tokens_LE)
    chosen: list[float] = concentrate(placement, tokens_LE, reading, quotas_LP)[0].tolist()
    return chosen


def test_each_rank_reads_as_many_experts_as_it_must() -> None:
    """Two replicas of experts 0 and 1, four experts to read on two ranks."""
    both = placed((0, 1, 2), (0, 1, 3))
    assert concentrated(both, [20, 10, 9, 9], reading=100) == [1, 0, 1, 0, 1, 1]


def test_a_chain_of_ranks_passes_experts_on() -> None:
    """Rank 0 holds three experts of which only 2 has a replica elsewhere: on rank 1, which must pass 3 on to
    rank 2 then. The hottest first, expert 3 goes to rank 1 and expert 2 to rank 0.
    """
    chain = placed((0, 1, 2), (2, 3, 4), (3, 5, 6))
    tokens = [9.0, 9, 20, 21, 9, 9, 0]
    assert concentrated(chain, tokens, reading=100) == [1, 1, 0, 1, 0, 1, 1, 1, 1]


def test_where_tokens_take_longest_they_stay_even() -> None:
    both = placed((0, 1, 2), (0, 1, 3))
    tokens = [200.0, 100, 90, 90]
    even = split_quotas(both, np.array([tokens]))
    assert concentrated(both, tokens, reading=10) == even[0].tolist()


def test_an_expert_that_is_too_hot_for_one_rank_keeps_its_layer_even() -> None:
    """300 tokens take longer than the three experts that each rank reads."""
    both = placed((0, 1, 2), (0, 1, 3))
    tokens = [300.0, 10, 9, 9]
    even = split_quotas(both, np.array([tokens]))
    assert concentrated(both, tokens, reading=80) == even[0].tolist()


def test_layers_are_chosen_one_by_one() -> None:
    slots_LP = np.array([[0, 1, 2, 0, 1, 3]] * 2, dtype=np.int32)
    placement = Placement(slots_LP, 4, 2)
    tokens_LE = np.array([[2000.0, 1000, 900, 900], [20, 10, 9, 9]])
    quotas_LP = split_quotas(placement, tokens_LE)
    chosen_LP = concentrate(placement, tokens_LE, 100.0, quotas_LP)
    assert (chosen_LP[0] == quotas_LP[0]).all()
    assert set(chosen_LP[1]) == {0.0, 1.0}


def test_a_layer_without_tokens_and_one_without_replicas_stay_as_they_are() -> None:
    both = placed((0, 1, 2), (0, 1, 3))
    assert concentrated(both, [0, 0, 0, 0], reading=100) == [0.5, 0.5, 1, 0.5, 0.5, 1]
    single = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
    assert concentrated(single, [1, 2, 3, 4], reading=100) == [1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tokens", [2.0, 40.0, 150.0])
def test_the_longest_rank_never_takes_longer(seed: int, tokens: float) -> None:
    random = np.random.default_rng(seed)
    placement = random_placement(seed, layers=2, ranks=4, slots_per_rank=6, experts=18)
    tokens_LE = tokens * random.lognormal(size=(2, 18))
    even_LP = split_quotas(placement, tokens_LE)
    chosen_LP = concentrate(placement, tokens_LE, 100.0, even_LP)
    sums_LE = np.zeros((2, 18))
    np.add.at(sums_LE, (np.arange(2)[:, None], placement.slots_LP), chosen_LP)
    assert sums_LE == pytest.approx(np.ones((2, 18)))
    times = []
    for quotas_LP in (even_LP, chosen_LP):
        tokens_LRS = placement.slot_load_LP(tokens_LE, quotas_LP).reshape(2, 4, -1)
        tokens_LR = tokens_LRS.sum(axis=2)
        reads_LR = 100 * (1 - np.exp(-tokens_LRS)).sum(axis=2)
        times.append(np.maximum(tokens_LR + 2 * np.sqrt(tokens_LR), reads_LR).max(axis=1))
    assert (times[1] <= times[0] * (1 + 1e-9)).all()
    if tokens < 100:
        assert (times[1] < times[0]).any()
