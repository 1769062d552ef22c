"""Our series on a live `/metrics`, beside the status."""

from __future__ import annotations

import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Server


def samples(server: Server) -> dict[tuple[str, str], float]:
    """Our series: (name, own label) -> value."""
    found = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            if sample.name.startswith("ep_rebalance_"):
                assert sample.labels["model_name"] == "tiny_moe"
                own = [
                    v for k, v in sample.labels.items() if k not in ("model_name", "engine", "pid")
                ]
                found[sample.name, ",".join(own)] = sample.value
    return found


def assert_metrics_agree(server: Server) -> None:
    time.sleep(2)
    status, seen = server.status(), samples(server)
    assert seen["ep_rebalance_placement_generation", ""] == status["generation"]
    for outcome, count in status["plans"].items():
        assert seen["ep_rebalance_plans_total", outcome] == count
    for link, count in status["migrated_bytes"].items():
        assert seen["ep_rebalance_migrated_bytes_total", link] == count
    for phase, count in status["phase_tokens"].items():
        assert seen["ep_rebalance_phase_tokens_total", phase] == count
    for layer, ratio in enumerate(status["imbalance"]):
        assert seen["ep_rebalance_load_imbalance_ratio", str(layer)] == pytest.approx(ratio)
    stalls: dict[str, Any] = status["commit_stall_seconds"]
    total = stalls["first"] + len(stalls["values"])
    assert seen["ep_rebalance_commit_stall_seconds_count", ""] == total
