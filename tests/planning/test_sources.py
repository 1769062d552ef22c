"""Sources of changed slots, held against every replica that could serve."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SEEDS, clusters, random_placement

from ep_rebalance.placement import Placement
from ep_rebalance.planning.sources import choose_sources
from ep_rebalance.topology import LINKS, Topology


@st.composite
def changes(draw: st.DrawFn) -> tuple[Placement, Placement, Topology, list[int]]:
    """Two placements of the same sizes, and the size of an expert of each layer."""
    source, topology = draw(clusters(max_layers=3))
    sizes = source.num_layers, source.num_ranks, source.slots_per_rank, source.num_experts
    target = random_placement(draw(SEEDS), *sizes)
    expert_bytes = draw(
        st.lists(st.integers(1, 5), min_size=source.num_layers, max_size=source.num_layers)
    )
    return source, target, topology, expert_bytes


@given(changes(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_the_nearest_replica_with_the_fewest_bytes_sent_serves(
    change: tuple[Placement, Placement, Topology, list[int]], random
) -> None:
    source, target, topology, expert_bytes = change
    layers = sorted(random.sample(range(source.num_layers), random.randint(0, source.num_layers)))
    fetches = choose_sources(
        source, target, layers=layers, topology=topology, expert_bytes_L=expert_bytes
    )
    differ_N2 = np.argwhere(source.slots_LP != target.slots_LP).tolist()
    wanted = [(layer, slot) for layer, slot in differ_N2 if layer in layers]
    assert list(zip(fetches.layer, fetches.dst_slot, strict=True)) == wanted
    sent_R = [0] * source.num_ranks
    for f, (layer, slot) in enumerate(wanted):
        expert, rank = target.slots_LP[layer, slot], slot // source.slots_per_rank
        assert (fetches.expert[f], fetches.dst_rank[f]) == (expert, rank)
        ranks = (np.flatnonzero(source.slots_LP[layer] == expert) // source.slots_per_rank).tolist()
        far = {r: LINKS.index(topology.link(r, rank)) for r in ranks}
        nearest = [r for r in ranks if far[r] == min(far.values())]
        src = int(fetches.src_rank[f])
        assert fetches.src_slot[f] // source.slots_per_rank == src
        assert source.slots_LP[layer, fetches.src_slot[f]] == expert
        assert src in nearest
        assert fetches.link[f] == far[src]
        if far[src]:
            assert sent_R[src] == min(sent_R[r] for r in nearest)
            sent_R[src] += expert_bytes[layer]


@given(changes())
@settings(max_examples=50)
def test_each_fetch_is_over_one_kind_of_link(
    change: tuple[Placement, Placement, Topology, list[int]],
) -> None:
    source, target, topology, expert_bytes = change
    layers = range(source.num_layers)
    fetches = choose_sources(
        source, target, layers=layers, topology=topology, expert_bytes_L=expert_bytes
    )
    assert sum(fetches.over(link).sum() for link in LINKS) == len(fetches)
