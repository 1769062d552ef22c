"""Pools of gloo processes, one of each size for the whole session; hypothesis on busy machines."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from ranks import Ranks

from ep_rebalance.migration import compile_schedule
from ep_rebalance.planning.policies import compile_planner

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def ranks_of(two_ranks: Ranks, four_ranks: Ranks) -> dict[int, Ranks]:
    """The pools by size; a pool starts its processes when it is first used."""
    single, three = Ranks(1), Ranks(3)
    yield {1: single, 2: two_ranks, 3: three, 4: four_ranks}
    single.stop()
    three.stop()


@pytest.fixture(scope="session")
def compiled_schedule() -> None:
    """Machine code of the schedule on disk, so that no rank compiles it against a time limit."""
    compile_schedule()


@pytest.fixture(scope="session")
def compiled_planner(compiled_schedule: None) -> None:
    """The same of all planning."""
    compile_planner()
