"""Statuses as a server would report them."""

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.journal import initial_status
from ep_rebalance.telemetry.metrics import Status

PLACEMENT = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)


def make_status() -> Status:
    status = initial_status(config=RebalanceConfig(), model="m", placement=PLACEMENT, top_k=2)
    status.imbalance = [1.5, 1.25]
    status.overall_imbalance = {"served": 1.375, "contiguous": 1.5}
    status.rank_tokens = [10, 20]
    status.phase_tokens = {"prefill": 5, "decode": 3}
    status.plans["committed"] = 2
    status.generation = 2
    status.self_test = {"exact": 2}
    return status
