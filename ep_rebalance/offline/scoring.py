"""Scoring: how evenly a placement serves steps that its planner has not seen, and what it costs to get
there.

Letter of this module: `N` steps; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.kernels.shared_arithmetic import Ranks
from ep_rebalance.offline.traffic import Traffic
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.planning.sources import choose_sources
from ep_rebalance.routing.pours import HostTables, ground_of_ranks, pour_order, pour_tokens
from ep_rebalance.routing.thresholds import HASH_STRIDE, dispatch_thresholds
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What it takes to get from one placement to another.

    slots: slots that get another expert.
    fraction: of all slots.
    bytes: all that goes over links.
    busiest_rank_bytes: the most that a rank sends, or receives.
    serial_transfers: transfers that the busiest rank of a layer makes one after another, on average over
        the layers in which experts move. That many rounds of one send and one receive per rank suffice
        (Koenig's theorem on the edge colouring of bipartite graphs).
    cross_node: fraction of these slots that are filled from another node.
    """

    slots: int
    fraction: float
    bytes: int
    busiest_rank_bytes: int
    serial_transfers: float
    cross_node: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSplit:
    """How evenly tokens are split by each source's own counts, and how many stay near.

    balancedness: mean over max rank load, averaged over steps and layers.
    on_source, on_node: fractions of the (token, expert) pairs that are computed by the ranks of their own
        source, and on its node.
    """

    balancedness: float
    on_source: float
    on_node: float


def balancedness(
    steps_NLE: NDArray[np.integer],
    placement: Placement,
    quotas_LP: NDArray[np.float64] | None = None,
) -> float:
    """Mean over max rank load, averaged over steps and layers.

    steps_NLE: [N, L, E], tokens.
    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives; even if None.
    """
    return float(np.mean(1.0 / imbalance_L(placement.rank_load_LR(steps_NLE, quotas_LP))))


def best_split_balancedness(steps_NLE: NDArray[np.integer], placement: Placement) -> float:
    """The same if each step's tokens were split over the replicas as is best for that step: an upper bound
    for any dispatch on this placement.

    steps_NLE: [N, L, E], tokens.
    """
    return float(
        np.mean(
            [
                balancedness(step_LE[None], placement, split_quotas(placement, step_LE))
                for step_LE in steps_NLE
            ]
        )
    )


def score_own_counts(
    steps_NLE: NDArray[np.integer],
    placement: Placement,
    quotas_LP: NDArray[np.float64],
    topology: Topology,
    *,
    load_LE: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> OwnSplit:
    """What `dispatch.split: own_counts` does with these steps. Which source brings a token is drawn by lot.

    steps_NLE: [N, L, E], tokens.
    quotas_LP: float64 [L, P]. Where each source begins.
    load_LE: float64 [L, E], tokens. What the quotas were fitted to; without it, no token stays near but by
        chance.
    """
    random = np.random.default_rng(seed)
    size, node_R = topology.ranks_per_source, np.array(topology.node_of_rank)
    tables_SL = _tables_of_sources(placement, quotas_LP, topology, load_LE)
    sources = len(tables_SL)
    evenness, own, near, pairs = [], 0.0, 0.0, 0.0
    for number, step_LE in enumerate(steps_NLE):
        for layer, tokens_E in enumerate(step_LE):
            own_SE = random.multinomial(tokens_E, np.full(sources, 1 / sources)).T
            load_SR = np.empty((sources, placement.num_ranks))
            for source in range(sources):
                ranks = Ranks(placement.num_ranks, placement.slots_per_rank, source)
                tables = tables_SL[source][layer]
                load_SR[source] = pour_tokens(own_SE[source], tables, number * HASH_STRIDE, ranks)
                here = slice(source * size, (source + 1) * size)
                own += load_SR[source, here].sum()
                near += load_SR[source, np.isin(node_R, node_R[here])].sum()
            load_R = load_SR.sum(axis=0)
            pairs += load_R.sum()
            evenness.append(load_R.mean() / max(load_R.max(), 1e-300))
    pairs = max(pairs, 1e-300)
    return OwnSplit(
        balancedness=float(np.mean(evenness)), on_source=own / pairs, on_node=near / pairs
    )


def _tables_of_sources(
    placement: Placement,
    quotas_LP: NDArray[np.float64],
    topology: Topology,
    load_LE: NDArray[np.float64] | None,
) -> list[list[HostTables]]:
    """The tables of each source and layer."""
    layers, ranks = range(placement.num_layers), placement.num_ranks
    tables = [
        dispatch_thresholds(placement, layers, quotas_LP, topology=topology, rank=rank)
        for rank in range(0, ranks, topology.ranks_per_source)
    ]
    slots_LEC, _ = tables[0]
    poured_LX, _, row_LE = pour_order(
        slots_LEC,
        rows=placement.num_redundant,
        slots_per_rank=placement.slots_per_rank,
        num_ranks=ranks,
    )
    found = []
    for _, thresholds_LEC in tables:
        ground_LR = ground_of_ranks(slots_LEC, thresholds_LEC, quotas_LP, load_LE, ranks)
        columns = (slots_LEC, thresholds_LEC, poured_LX, row_LE, ground_LR)
        found.append([HostTables(*(column[layer] for column in columns)) for layer in layers])
    return found


def even_balancedness(pairs: int, ranks: int, *, steps: int = 10_000) -> float:
    """Mean over max rank load if each pair goes to a random rank: as even as chance allows.

    pairs: (token, expert) pairs of a step.
    steps: how many are sampled.
    """
    loads_NR = np.random.default_rng(0).multinomial(pairs, np.full(ranks, 1 / ranks), size=steps)
    return float(np.mean(loads_NR.mean(axis=1) / loads_NR.max(axis=1)))


def cross_node_tokens(
    steps_NLE: NDArray[np.integer],
    placement: Placement,
    quotas_LP: NDArray[np.float64],
    topology: Topology,
) -> float:
    """Fraction of the (token, expert) pairs that are computed on another node than the token's.

    steps_NLE: [N, L, E], tokens.
    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives.

    Assumes that each rank brings the same share of every expert's tokens, and that near replicas are
    preferred.
    """
    return 1.0 - Traffic.of(steps_NLE.sum(axis=0), placement, quotas_LP, topology).node_share


def moves_between(
    source: Placement, target: Placement, topology: Topology, expert_bytes_L: Sequence[int]
) -> Moves:
    """What the migration from `source` to `target` takes.

    expert_bytes_L: L sizes, bytes. One expert of each layer.
    """
    fetches = choose_sources(
        source,
        target,
        layers=range(source.num_layers),
        topology=topology,
        expert_bytes_L=expert_bytes_L,
    )
    sent_LR = np.zeros((source.num_layers, source.num_ranks), dtype=np.int64)
    received_LR = np.zeros_like(sent_LR)
    sent_F = ~fetches.over("local")
    np.add.at(sent_LR, (fetches.layer[sent_F], fetches.src_rank[sent_F]), 1)
    np.add.at(received_LR, (fetches.layer[sent_F], fetches.dst_rank[sent_F]), 1)
    serial_L = np.maximum(sent_LR, received_LR).max(axis=1)
    bytes_L = np.array(expert_bytes_L, dtype=np.int64)
    return Moves(
        slots=len(fetches),
        fraction=len(fetches) / source.slots_LP.size,
        bytes=int(sent_LR.sum(axis=1) @ bytes_L),
        busiest_rank_bytes=int(max((bytes_L @ sent_LR).max(), (bytes_L @ received_LR).max())),
        serial_transfers=float(serial_L[serial_L > 0].mean()) if serial_L.any() else 0.0,
        cross_node=int(fetches.over("internode").sum()) / max(len(fetches), 1),
    )
