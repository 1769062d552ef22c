"""Experts that do not divide by the ranks lie where vLLM puts them, in each release."""

from pathlib import Path

import numpy as np
import pytest
from engine_releases import NEEDS_033, told_by

from ep_rebalance.placement import Placement

MAPS = Path(__file__).with_name("vllm_expert_maps.py")


@pytest.mark.parametrize("release", ["0.32", pytest.param("0.33", id="0.33", marks=NEEDS_033)])
def test_each_slot_is_on_the_rank_that_holds_it(release: str) -> None:
    told = told_by(MAPS, release)
    for found in told["maps"]:
        experts, ranks = found["experts"], found["ranks"]
        sizes = {"num_layers": 1, "num_experts": experts, "num_ranks": ranks}
        linear, dealt = Placement.contiguous(**sizes), Placement.round_robin(**sizes)
        assert by_rank(linear) == found["linear"], found
        if experts >= ranks:
            assert by_rank(dealt) == found["round_robin"], found
            assert np.argsort(dealt.slots_LP[0]).tolist() == found["dealt_slots"]


def by_rank(placement: Placement) -> list[list[int]]:
    """The experts of each rank, in the order of their slots."""
    rank_P = placement.rank_of(np.arange(placement.num_slots))
    return [placement.slots_LP[0, rank_P == rank].tolist() for rank in range(placement.num_ranks)]
