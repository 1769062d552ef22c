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
from ep_rebalance.routing.pours import HostTables, pour_order, pour_tokens
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


def own_counts_balancedness(
    steps_NLE: NDArray[np.integer],
    placement: Placement,
    quotas_LP: NDArray[np.float64],
    topology: Topology,
    *,
    seed: int = 0,
) -> float:
    """The same if each source splits its own tokens of a step evenly, as `dispatch.split: own_counts` does.
    Which source brings a token is drawn by lot.

    steps_NLE: [N, L, E], tokens.
    quotas_LP: float64 [L, P]. Where each source begins.
    """
    random = np.random.default_rng(seed)
    layers = range(placement.num_layers)
    sources = topology.num_ranks // topology.ranks_per_source
    tables = [
        dispatch_thresholds(
            placement, layers, quotas_LP, topology=topology, rank=source * topology.ranks_per_source
        )
        for source in range(sources)
    ]
    slots_LEC, _ = tables[0]
    poured_LX, _, row_LE = pour_order(
        slots_LEC,
        rows=placement.num_redundant,
        slots_per_rank=placement.slots_per_rank,
        num_ranks=placement.num_ranks,
    )
    evenness = []
    for number, step_LE in enumerate(steps_NLE):
        for layer in layers:
            own_SE = random.multinomial(step_LE[layer], np.full(sources, 1 / sources)).T
            load_R = np.zeros(placement.num_ranks)
            for source, tokens_E in enumerate(own_SE):
                thresholds_LEC = tables[source][1]
                host = HostTables(
                    slots_LEC[layer], thresholds_LEC[layer], poured_LX[layer], row_LE[layer]
                )
                ranks = Ranks(placement.num_ranks, placement.slots_per_rank, source)
                load_R += pour_tokens(tokens_E, host, number * HASH_STRIDE, ranks)
            evenness.append(load_R.mean() / max(load_R.max(), 1e-300))
    return float(np.mean(evenness))


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
