"""What commands that read traces have in common: errors that the user can fix, and settings."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
import yaml

from ep_rebalance.commands.output import say
from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config, nest, read_config_file
from ep_rebalance.load.trace import TraceError, TraceReader
from ep_rebalance.offline.run import NothingRecorded


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors that the user can fix into one sentence and exit code 2."""
    try:
        yield
    except (TraceError, NothingRecorded, ConfigurationError, ValueError, OSError) as error:
        say(f"ep-rebalance: {_told(error)}")
        raise typer.Exit(2) from None


def _told(error: Exception) -> str:
    """What the error says; of the system's, in our order and with a remedy for the usual ones."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error).removeprefix("ep_rebalance: ")
    remedies = {
        errno.ENOENT: "there is no such file or folder; look at the path",
        errno.EACCES: "this user may not open it; change its rights, or run as another user",
    }
    if error.errno == errno.EINVAL:  # of regular_files.py
        return f"{error.filename}: {error.strerror}; write what it holds into one"
    return f"{error.filename}: {remedies.get(error.errno or 0, error.strerror)}"


def settings_for(
    trace: TraceReader, file: Path | None, assignments: Sequence[str]
) -> RebalanceConfig:
    """The recorded server's settings, or those of a file, overridden by single assignments.

    assignments: `KEY=VALUE` each, with a dotted key.

    Raises ConfigurationError for what cannot be set, and ValueError that names the trace if it is that whose
    settings cannot be.
    """
    try:
        load_config(trace.head.config)
    except ConfigurationError as error:
        raise ValueError(
            f"{trace.path} was recorded with settings that this version does not take: {error.reason} Replay "
            f"it with the ep-rebalance that wrote it ({trace.head.plugin_version})"
        ) from None
    base = trace.head.config if file is None else read_config_file(file)
    example = "planner.half_life_snapshots=6"
    pairs = (assignment("--set", text, example) for text in assignments)
    return load_config(base, *(nest(key.split("."), value) for key, value in pairs))


def assignment(option: str, text: str, example: str) -> tuple[str, Any]:
    """(key, value) of `KEY=VALUE`. Raises ValueError that names the option and an example."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{option} {text!r}: write KEY=VALUE, e.g. {option} {example}")
    return key, yaml.safe_load(value)
