"""Traffic: how many (token, expert) pairs stay on their rank or on their node, and what the others send.

As `routing/thresholds.py` has it, every rank brings the same share of each expert's tokens, and a token
stays on its rank if a replica is there, else on its node, as far as the quotas allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """Where the pairs that a rank computes come from.

    home_LR: float64 [L, R], pairs. From the rank itself.
    near_LR: float64 [L, R], pairs. From other ranks of its node.
    far_LR: float64 [L, R], pairs. From other nodes.
    """

    topology: Topology
    home_LR: NDArray[np.float64]
    near_LR: NDArray[np.float64]
    far_LR: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        counts_LE: NDArray[np.integer],
        placement: Placement,
        quotas_LP: NDArray[np.float64],
        topology: Topology,
    ) -> Traffic:
        """The traffic of a load.

        counts_LE: [L, E], tokens.
        quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives.
        """
        home_LR, near_LR, far_LR = _flows(
            np.array(counts_LE, dtype=np.float64),
            np.array(placement.slots_LP),
            np.array(quotas_LP, dtype=np.float64),
            placement.rank_of(np.arange(placement.num_slots)),
            np.array(topology.node_of_rank, dtype=np.int64),
        )
        return cls(topology=topology, home_LR=home_LR, near_LR=near_LR, far_LR=far_LR)

    @property
    def pairs(self) -> float:
        return float(self.home_LR.sum() + self.near_LR.sum() + self.far_LR.sum())

    @property
    def home_share(self) -> float:
        """Fraction of the pairs that stay on their rank; 0 without any."""
        return float(self.home_LR.sum()) / max(self.pairs, 1e-300)

    @property
    def node_share(self) -> float:
        """Fraction of the pairs that stay on their node, or even on their rank; 0 without any."""
        return float(self.home_LR.sum() + self.near_LR.sum()) / max(self.pairs, 1e-300)

    def copies_LR(self, top_k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(within_LR, across_LR), tokens that reach a rank over links of its node, and those that come to
        its node from others, for each of its ranks.

        A token goes once to each other node that holds one of its experts, and once to each such rank
        there, as in DeepEP. Its experts are taken to be drawn independently of each other.
        """
        node_R = np.array(self.topology.node_of_rank)
        on_node_R = np.bincount(node_R)[node_R].astype(np.float64)
        elsewhere_R = self.topology.num_ranks - on_node_R
        pairs_L1 = (self.home_LR + self.near_LR + self.far_LR).mean(axis=1, keepdims=True)
        to_node_LR = (self.far_LR @ (node_R[:, None] == node_R)).astype(np.float64)
        tokens_L1 = pairs_L1 / top_k
        near_LR = _reached(self.near_LR, (on_node_R - 1.0) * pairs_L1, top_k)
        far_LR = _reached(self.far_LR, elsewhere_R * pairs_L1, top_k)
        crossing_LR = _reached(to_node_LR, elsewhere_R * pairs_L1, top_k)
        within_LR = tokens_L1 * ((on_node_R - 1.0) * near_LR + elsewhere_R * far_LR)
        return within_LR, tokens_L1 * elsewhere_R * crossing_LR / on_node_R


def _reached(
    pairs: NDArray[np.float64], of: NDArray[np.float64], top_k: int
) -> NDArray[np.float64]:
    """The fraction of tokens of which at least one pair goes there, if `pairs` go there `of` so many."""
    part = np.where(of > 0, pairs / np.where(of > 0, of, 1.0), 0.0)
    reached: NDArray[np.float64] = 1.0 - (1.0 - np.clip(part, 0.0, 1.0)) ** top_k
    return reached


@compiled
def _flows(
    load_LE: NDArray[np.float64],
    slots_LP: NDArray[np.int32],
    quotas_LP: NDArray[np.float64],
    rank_P: NDArray[np.int64],
    node_R: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(home_LR, near_LR, far_LR), as in `Traffic`."""
    layers, num_ranks, num_experts = len(load_LE), node_R.size, load_LE.shape[1]
    num_nodes = node_R.max() + 1
    share = 1.0 / num_ranks
    share_N = np.zeros(num_nodes)
    for node in node_R:
        share_N[node] += share
    home_LR, near_LR = np.zeros((layers, num_ranks)), np.zeros((layers, num_ranks))
    far_LR = np.zeros((layers, num_ranks))
    for layer in range(layers):
        slots_P = slots_LP[layer]
        quota_P = _rank_quotas(slots_P, quotas_LP[layer], rank_P, num_experts)
        quota_NE, kept_NE = np.zeros((num_nodes, num_experts)), np.zeros((num_nodes, num_experts))
        for slot in range(slots_P.size):
            node = node_R[rank_P[slot]]
            quota_NE[node, slots_P[slot]] += quota_P[slot]
            kept_NE[node, slots_P[slot]] += min(quota_P[slot], share)
        for slot in range(slots_P.size):
            rank, expert, quota = rank_P[slot], slots_P[slot], quota_P[slot]
            node, load = node_R[rank], load_LE[layer, expert]
            kept = min(quota, share)
            # What its sources have left fills what capacity is left on the node.
            room = quota_NE[node, expert] - kept_NE[node, expert]
            flow = min(room, share_N[node] - kept_NE[node, expert])
            near = (quota - kept) * flow / room if room > 1e-12 else 0.0
            home_LR[layer, rank] += load * kept
            near_LR[layer, rank] += load * near
            far_LR[layer, rank] += load * max(quota - kept - near, 0.0)
    return home_LR, near_LR, far_LR


@compiled
def _rank_quotas(
    slots_P: NDArray[np.int32],
    quotas_P: NDArray[np.float64],
    rank_P: NDArray[np.int64],
    num_experts: int,
) -> NDArray[np.float64]:
    """float64 [P], what the rank of a slot has of its expert; 0 for the second slot of the same expert there,
    which vLLM's own placements have.
    """
    quota_P, first_E = np.zeros(slots_P.size), np.full(num_experts, -1)
    for slot in range(slots_P.size):
        expert = slots_P[slot]
        if first_E[expert] < 0 or rank_P[first_E[expert]] != rank_P[slot]:
            first_E[expert] = slot
        quota_P[first_E[expert]] += quotas_P[slot]
    return quota_P
