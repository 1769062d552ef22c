"""Random migrations, and weights to carry out."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import placements, random_slots

from ep_rebalance.migration import Migration, schedule
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.topology import Topology

Weights = list[NDArray[np.uint8]]
"""One array [P, bytes] for each layer."""


@st.composite
def settings_of_a_schedule(draw: st.DrawFn) -> dict[str, Any]:
    source = draw(placements(max_layers=4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots_LP = source.slots_LP.copy()
    for layer in range(source.num_layers):
        if draw(st.booleans()):
            slots_LP[layer] = random_slots(
                generator, source.num_ranks, source.slots_per_rank, source.num_experts
            )
    nodes = draw(st.lists(st.integers(0, 1), min_size=source.num_ranks, max_size=source.num_ranks))
    layers = source.num_layers
    return {
        "source": source,
        "target": Placement(slots_LP, source.num_experts, source.num_ranks),
        "topology": Topology(node_of_rank=tuple(nodes)),
        "expert_bytes_L": draw(st.lists(st.integers(1, 900), min_size=layers, max_size=layers)),
        "pace": Pace(
            max_bytes=draw(st.integers(21, 2000)),
            max_internode_bytes=draw(st.integers(21, 2000)),
            layers=tuple(draw(st.permutations(range(layers)))[: draw(st.integers(0, layers))]),
        ),
        "staging_slots": draw(st.integers(source.slots_per_rank, 3 * source.slots_per_rank)),
    }


def scheduled(arguments: dict[str, Any], rank: int | None = None) -> Migration:
    quotas_LP = arguments["target"].even_quotas_LP()
    return schedule(quotas_LP=quotas_LP, rank=rank, **arguments)


def weights_of(placement: Placement, expert_bytes_L: list[int]) -> Weights:
    """Of each slot those of its expert; random, and the same in every placement."""
    return [
        expert_weights(layer, placement.num_experts, size)[slots_P]
        for layer, (size, slots_P) in enumerate(
            zip(expert_bytes_L, placement.slots_LP, strict=True)
        )
    ]


def expert_weights(seed: int, experts: int, num_bytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (experts, num_bytes), dtype=np.uint8)
