"""Random placements, loads and problems for the planning tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, TokenCost
from ep_rebalance.planning.problem import Budget, Problem
from ep_rebalance.topology import Topology

Samples = NDArray[np.float64]

SEEDS = st.integers(0, 2**32 - 1)

STEPS = 16
"""Engine steps in each sample."""


@st.composite
def placements(draw: st.DrawFn, max_layers: int = 2) -> Placement:
    """Any placement of small sizes: every expert somewhere, no expert twice on a rank."""
    ranks = draw(st.integers(1, 5))
    slots_per_rank = draw(st.integers(1, 6))
    experts = draw(st.integers(slots_per_rank, ranks * slots_per_rank))
    layers = draw(st.integers(1, max_layers))
    return random_placement(draw(SEEDS), layers, ranks, slots_per_rank, experts)


@st.composite
def clusters(draw: st.DrawFn, max_layers: int = 2) -> tuple[Placement, Topology]:
    """A placement on ranks of one or of several, uneven nodes; often of a size that is easily got
    wrong.
    """
    ranks = draw(st.integers(1, 7))
    slots_per_rank = draw(st.integers(1, 6))
    most = ranks * slots_per_rank
    experts = draw(st.integers(slots_per_rank, most))
    shape = draw(
        st.sampled_from(["any", "one redundant slot", "an expert per rank", "indivisible"])
    )
    if shape == "one redundant slot":
        experts = max(most - 1, slots_per_rank)
    elif shape == "an expert per rank":
        experts, slots_per_rank = ranks, min(slots_per_rank, ranks)
    topology = draw(topologies(ranks))
    if shape == "indivisible" and experts % topology.num_nodes == 0:
        experts = max(experts - 1, slots_per_rank)
    layers = draw(st.integers(1, max_layers))
    return random_placement(draw(SEEDS), layers, ranks, slots_per_rank, experts), topology


@st.composite
def topologies(draw: st.DrawFn, num_ranks: int) -> Topology:
    """One node, or several of any sizes; ranks of a node need not be neighbours."""
    nodes = draw(st.integers(1, min(3, num_ranks)))
    elsewhere = draw(
        st.lists(st.integers(0, nodes - 1), min_size=num_ranks - nodes, max_size=num_ranks - nodes)
    )
    return Topology(node_of_rank=tuple(draw(st.permutations([*range(nodes), *elsewhere]))))


@st.composite
def loads(draw: st.DrawFn, placement: Placement) -> Samples:
    """Counts that may be even, skewed, few, all of one expert, or absent from a layer or a sample."""
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))
    snapshots = draw(st.integers(1, 6))
    samples_WLE = random_samples(draw(SEEDS), placement, snapshots=snapshots, skew=skew)
    layer = draw(st.integers(0, placement.num_layers - 1))
    kind = draw(st.sampled_from(["any", "few", "one expert", "idle layer", "idle sample"]))
    if kind == "few":
        samples_WLE //= 200
    elif kind == "one expert":
        expert = draw(st.integers(0, placement.num_experts - 1))
        samples_WLE[:, layer] = 0
        samples_WLE[:, layer, expert] = 200 * placement.num_experts
    elif kind == "idle layer":
        samples_WLE[:, layer] = 0
    elif kind == "idle sample":
        samples_WLE[0] = 0
    return samples_WLE


@st.composite
def problems(draw: st.DrawFn, max_layers: int = 2) -> Problem:
    """Any of the above, in tokens or in time, with a budget that may be tight or none."""
    current, topology = draw(clusters(max_layers))
    samples_WLE = draw(loads(current))
    return problem_of(
        window_of(samples_WLE, half_life=draw(st.sampled_from([np.inf, 2.0]))),
        current,
        topology=topology,
        budget=Budget(
            max_moved_slots=draw(st.integers(0, 12) | st.just(1000)),
            max_arrivals=draw(st.integers(1, 6)),
        ),
        cost=draw(st.sampled_from([TokenCost(), small_roofline()])),
        internode_token_price=draw(st.sampled_from([0.0, 0.02, 0.5])),
    )


def random_placement(
    seed: int, layers: int, ranks: int, slots_per_rank: int, experts: int
) -> Placement:
    generator = np.random.default_rng(seed)
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


def window_of(samples_WLE: Samples, *, half_life: float = np.inf) -> WindowLoad:
    """The samples as a window, oldest first."""
    ages_W = np.arange(len(samples_WLE))[::-1]
    return WindowLoad(
        tokens_WLE=samples_WLE,
        weight_W=0.5 ** (ages_W / half_life),
        steps_W=np.full(len(samples_WLE), float(STEPS)),
    )


def problem_of(load: Samples | WindowLoad, current: Placement, **others: Any) -> Problem:
    """On one node and with a budget for everything, unless `others` say more."""
    defaults = {"topology": Topology.single_node(current.num_ranks), "budget": budget_of(current)}
    window = load if isinstance(load, WindowLoad) else window_of(load)
    return Problem(load=window, current=current, **(defaults | others))


def budget_of(placement: Placement, fraction: float = 1.0, arrivals: int | None = None) -> Budget:
    return Budget(
        max_moved_slots=int(fraction * placement.slots_LP.size),
        max_arrivals=placement.slots_per_rank if arrivals is None else arrivals,
    )


def small_roofline() -> RooflineCost:
    """Reading an expert takes as long as computing 10 tokens."""
    return RooflineCost(reading=10.0)
