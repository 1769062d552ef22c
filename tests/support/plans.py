"""Plans as rank 0 makes them."""

import numpy as np

from ep_rebalance.placement import Placement
from ep_rebalance.planning.problem import Plan

PLACEMENT = Placement(np.array([[0, 1, 2, 1], [2, 0, 1, 0]]), 3, 2)


QUOTAS_LP = np.array([[1, 1 / 3, 1, 2 / 3], [1, 0.1, 1, 0.9]])


def plan_of(placement: Placement, quotas_LP) -> Plan:
    ones_L = np.ones(placement.num_layers)
    return Plan(
        placement=placement,
        quotas_LP=quotas_LP,
        unmoved_quotas_LP=quotas_LP,
        imbalance_before_L=ones_L,
        imbalance_after_L=ones_L,
        moved_slots=0,
    )
