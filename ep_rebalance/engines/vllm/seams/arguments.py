"""Seam: the command line of `vllm serve` and of everything else that takes engine arguments.

Target: `EngineArgs.add_cli_args`. Why: vLLM has no option for plugins, only the variable
`VLLM_PLUGINS`. Can go when vLLM takes arguments of plugins itself. After parsing, the flags are folded
into `additional_config`, which reaches every process. Not earlier, since vLLM appends dotted keys
(`--ep-rebalance-config.mode observe`) last.
"""

from __future__ import annotations

import argparse
import functools
import os
from importlib.metadata import entry_points
from typing import Any

from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import (
    load_config,
    parse_config_argument,
    settings_from_environment,
)
from ep_rebalance.engines.vllm.engine_config import CONFIG_KEY, VERSION_KEY
from ep_rebalance.version import __version__

NAME = "ep_rebalance"
_GROUPS_LOADED_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def install(engine_args: type[Any]) -> None:
    """Make `engine_args.add_cli_args` add our group of arguments."""
    original = engine_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        _add_arguments(parser)
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        title="EpRebalance", description="Expert-parallel load balancing (ep-rebalance)."
    )
    group.add_argument(
        "--plugin",
        action="append",
        choices=[NAME],
        help="Activate a plugin. `ep_rebalance` counts tokens per expert and moves experts between the "
        "expert-parallel ranks while serving; needs --enable-expert-parallel.",
    )
    group.add_argument(
        "--ep-rebalance-config",
        action="append",
        metavar="FILE|JSON",
        help="Settings of ep_rebalance: a YAML file, JSON text, or dotted keys such as "
        "`--ep-rebalance-config.mode observe`. Later ones win. `ep-rebalance config` lists all keys.",
    )
    original = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = original(*args, **kwargs)
        try:
            _fold(namespace)
        except ConfigurationError as error:
            parser.error(str(error))
        return namespace, rest

    parser.parse_known_args = parse_known_args  # type: ignore[assignment, method-assign]


def _fold(namespace: argparse.Namespace) -> None:
    """Move our arguments into `additional_config`, and add our name to VLLM_PLUGINS."""
    plugins = namespace.__dict__.pop("plugin", None)
    arguments = namespace.__dict__.pop("ep_rebalance_config", None) or []
    if not plugins:
        if arguments:
            raise ConfigurationError(
                "--ep-rebalance-config is given but the plugin is not active.",
                f"add --plugin {NAME}.",
            )
        return
    if not getattr(namespace, "enable_expert_parallel", False):
        raise ConfigurationError(
            f"--plugin {NAME} balances experts over expert-parallel ranks, and there are none.",
            "add --enable-expert-parallel, with --tensor-parallel-size or --data-parallel-size above 1.",
        )
    additional = dict(getattr(namespace, "additional_config", None) or {})
    files = [text for text in arguments if not text.lstrip().startswith("{")]
    flags = [text for text in arguments if text.lstrip().startswith("{")]
    # Later ones win: files, the environment, the command line, `--additional-config`.
    config = load_config(
        *map(parse_config_argument, files),
        settings_from_environment(),
        *map(parse_config_argument, flags),
        additional.get(CONFIG_KEY) or {},
    )
    namespace.additional_config = {
        **additional,
        CONFIG_KEY: config.as_dict(),
        VERSION_KEY: __version__,
    }
    _allow_endpoint()


def _allow_endpoint() -> None:
    """vLLM loads HTTP routes only from plugins that VLLM_PLUGINS names. If it was unset, all other plugins
    are named too: naming ours alone would switch them off.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        found = {e.name for group in _GROUPS_LOADED_BY_DEFAULT for e in entry_points(group=group)}
        os.environ["VLLM_PLUGINS"] = ",".join(sorted(found | {NAME}))
    elif NAME not in named.split(","):
        os.environ["VLLM_PLUGINS"] = f"{named},{NAME}" if named else NAME
