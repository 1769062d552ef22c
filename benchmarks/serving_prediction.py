"""What a replay of the contiguous server's trace predicts for the server that rebalances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep_rebalance.commands.side_by_side import replay_all
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import read_records
from ep_rebalance.offline.learned import expert_time
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.planning.expert_time import ExpertTime

POLICIES = ("none", "ours", "hindsight")


def predicted_ratios(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, float], ExpertTime]:
    """(tokens per second of each policy to those of the contiguous placement, in the second half of the
    trace, when the balancer has found its placement; what of a step was taken to wait for experts, which is
    learned from the same trace). Nothing is fitted to what was measured of the server that rebalances.

    settings: of the server that rebalances.
    """
    readers = open_traces([folder])
    head, config = readers[0].head, load_config(settings)
    redundant = config.planner.redundant_experts
    waiting = expert_time(head, read_records(readers), config)
    scenarios = [
        scenario(head, config, policy, head.ep_size, redundant, expert_time=waiting)
        for policy in POLICIES
    ]
    none, *others = replay_all(readers, scenarios, jobs=1)
    half = len(none.seconds_N) // 2
    ratios = {
        one.scenario.policy: float(
            (none.seconds_N @ none.steps_N - none.seconds_N[:half] @ none.steps_N[:half])
            / (one.seconds_N[half:] @ one.steps_N[half:])
        )
        for one in others
    }
    return ratios, waiting
