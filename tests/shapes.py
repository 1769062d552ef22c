"""Random placements and loads for the planning tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_rebalance.placement import Placement
from ep_rebalance.planning.plan import Budget

Samples = NDArray[np.float64]


@st.composite
def placements(draw: st.DrawFn, max_layers: int = 2) -> Placement:
    """Any placement of small sizes: every expert somewhere, no expert twice on a rank."""
    ranks = draw(st.integers(1, 5))
    slots_per_rank = draw(st.integers(1, 6))
    slots = ranks * slots_per_rank
    experts = draw(st.integers(slots_per_rank, slots))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = draw(st.integers(1, max_layers))
    slots_LP = [random_slots(generator, ranks, slots_per_rank, experts) for _ in range(layers)]
    return Placement(np.array(slots_LP, dtype=np.int32), experts, ranks)


def random_slots(
    generator: np.random.Generator, ranks: int, slots_per_rank: int, experts: int
) -> list[int]:
    """Deals replicas to the emptiest ranks, so that no expert meets itself."""
    replicas_E = np.ones(experts, dtype=np.int64)
    while replicas_E.sum() < ranks * slots_per_rank:
        replicas_E[generator.choice(np.flatnonzero(replicas_E < ranks))] += 1
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(experts), key=lambda e: (-replicas_E[e], generator.random())):
        emptiest = sorted(range(ranks), key=lambda rank: (len(held[rank]), generator.random()))
        for rank in emptiest[: replicas_E[expert]]:
            held[rank].append(expert)
    return [expert for experts_S in held for expert in generator.permutation(experts_S).tolist()]


def random_samples(
    seed: int, placement: Placement, *, snapshots: int = 6, skew: float = 1.0
) -> Samples:
    """Multinomial counts around log-normal popularities; about 200 tokens for each expert."""
    generator = np.random.default_rng(seed)
    layers, experts = placement.num_layers, placement.num_experts
    popularity_LE = np.exp(skew * generator.standard_normal((layers, experts)))
    popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
    counts = generator.multinomial(200 * experts, popularity_LE, size=(snapshots, layers))
    return counts.astype(np.float64)


def budget_of(placement: Placement, fraction: float = 1.0, arrivals: int | None = None) -> Budget:
    return Budget(
        max_moved_slots=int(fraction * placement.slots_LP.size),
        max_arrivals=placement.slots_per_rank if arrivals is None else arrivals,
    )
