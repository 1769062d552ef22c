"""A configuration and the paths that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config, read_config_file
from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.load.state import check_writable
from ep_rebalance.load.trace import check_folder


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
        path = Path(config.state.path)
        yield _path("state.path", config.state.path, lambda: check_writable(path))
    if config.trace.path is not None:
        folder = config.trace.path
        yield _path("trace.path", folder, lambda: check_folder(folder))


def _path(name: str, path: str, check_path: Callable[[], None]) -> Finding:
    try:
        check_path()
    except ConfigurationError as error:
        return Finding(check=name, verdict="problem", found=error.reason, remedy=error.remedy)
    return Finding(check=name, verdict="ok", found=path)
