"""A configuration and the paths that it names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config, read_config_file
from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.load.state import check_writable


def checks(file: Path | None) -> list[tuple[str, Check]]:
    """(name, check) pairs for a YAML or JSON file; none without a file."""
    return [] if file is None else [("settings", lambda: settings(file))]


def served_with(file: Path | None) -> RebalanceConfig:
    """The settings; the defaults if there are none, or if they cannot be read, which `settings` reports."""
    try:
        return RebalanceConfig() if file is None else load_config(read_config_file(file))
    except ConfigurationError:
        return RebalanceConfig()


def settings(file: Path) -> Iterator[Finding]:
    """Whether the settings are valid, and the paths in them usable."""
    try:
        config = load_config(read_config_file(file))
    except ConfigurationError as error:
        yield Finding(check="settings", verdict="problem", found=error.reason, remedy=error.remedy)
        return
    yield Finding(
        check="settings",
        verdict="ok",
        found=f"mode {config.mode}, policy {config.planner.policy}, "
        f"{config.planner.redundant_experts} redundant experts",
    )
    yield from _paths(config)


def _paths(config: RebalanceConfig) -> Iterator[Finding]:
    if config.state.path is not None:
        try:
            check_writable(Path(config.state.path))
            yield Finding(check="state.path", verdict="ok", found=config.state.path)
        except ConfigurationError as error:
            yield Finding(
                check="state.path", verdict="problem", found=error.reason, remedy=error.remedy
            )
    if config.trace.path is not None:
        writable = os.access(config.trace.path, os.W_OK | os.X_OK)
        yield Finding(
            check="trace.path",
            verdict="ok" if writable else "problem",
            found=config.trace.path,
            remedy="" if writable else "create this folder, or let the server write to it",
        )
