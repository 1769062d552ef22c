"""The accelerators that are known, by name: hardware.yaml. `step_time` computes with their figures."""

from __future__ import annotations

from importlib import resources

import yaml


def hardware_table() -> str:
    """The table that comes with the package, as YAML with its sources."""
    return resources.files("ep_rebalance.offline").joinpath("hardware.yaml").read_text("utf-8")


def hardware_names() -> tuple[str, ...]:
    """The names of the rows of that table."""
    return tuple(yaml.safe_load(hardware_table()))
