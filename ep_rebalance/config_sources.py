"""Settings: what files, the environment and command lines give, merged into one `RebalanceConfig`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.regular_files import read_regular

ENVIRONMENT_PREFIX = "EP_REBALANCE_"

_MAX_BYTES = 1 << 20
_UNREADABLE = (
    *(OSError, yaml.YAMLError, RecursionError),
    *(ValueError, AttributeError),  # what PyYAML raises for `2026-13-01` and `!!timestamp text`
)


def load_config(*layers: Any) -> RebalanceConfig:
    """Merge `layers` over the defaults and validate the result.

    layers: mappings of keys. A later one wins, key by key.

    Raises ConfigurationError that names each offending key, its value and what would be right.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise ConfigurationError(
                f"the settings are {layer!r}, not keys with values.",
                'write them like `mode: observe`, or in JSON like {"mode": "observe"}.',
            )
        merged = _merge(merged, layer)
    try:
        return RebalanceConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigurationError(_explain(error), _remedy(error)) from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file. Raises ConfigurationError for anything else."""
    try:
        settings = yaml.safe_load(read_regular(Path(path), _MAX_BYTES).decode())
    except _UNREADABLE as error:
        raise ConfigurationError(
            f"the configuration file {str(path)!r} cannot be read ({error}).",
            "give a readable YAML or JSON file to --ep-rebalance-config.",
        ) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"the configuration file {str(path)!r} holds a {type(settings).__name__}, not settings.",
            "write `section: {key: value}` lines, as `ep-rebalance config` prints them.",
        )
    return settings


def parse_config_argument(text: str) -> dict[str, Any]:
    """Settings from one command-line value: JSON text if it starts with `{`, else the path of a file."""
    if not text.lstrip().startswith("{"):
        return read_config_file(text)
    try:
        settings: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number of too many digits
        raise ConfigurationError(
            f"--ep-rebalance-config is not valid JSON ({error}).",
            'write it like \'{"mode": "observe"}\', or give the path of a YAML file.',
        ) from None
    return settings


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """`EP_REBALANCE_MIGRATION__MAX_BYTES_PER_STEP=1048576` as `{"migration": {"max_bytes_per_step":
    1048576}}`.

    Raises ConfigurationError that names the variable if it is none of our settings.
    """
    settings: dict[str, Any] = {}
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            if keys[0] not in RebalanceConfig.model_fields:
                raise ConfigurationError(
                    f"the environment variable {name} sets {keys[0]!r}, an unknown configuration key.",
                    "correct or unset it. Kubernetes sets such variables for a Service named ep-rebalance: "
                    "rename that, or give the pod enableServiceLinks: false.",
                )
            settings = _merge(settings, nest(keys, _environment_value(name, value)))
    return settings


def _environment_value(name: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)  # so that numbers, booleans and lists get their types
    except _UNREADABLE:
        raise ConfigurationError(
            f"the environment variable {name}={value!r} is not a YAML value.",
            "correct or unset it.",
        ) from None


def nest(keys: list[str], value: Any) -> dict[str, Any]:
    """`["a", "b"], 1` as `{"a": {"b": 1}}`."""
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "configuration"
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown configuration key {where!r}.")
        elif fault["type"] == "value_error":
            faults.append(f"{where}: {fault['ctx']['error']}.")
        else:
            faults.append(f"{where}={fault['input']!r} is not allowed: {fault['msg']}.")
    return " ".join(faults)


def _remedy(error: ValidationError) -> str:
    for fault in error.errors():
        if fault["type"] == "extra_forbidden":
            section = _section(fault["loc"][:-1])
            return f"use one of: {', '.join(sorted(section.model_fields))}."
    return "`ep-rebalance config` prints every key with its default and meaning."


def _section(location: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = RebalanceConfig
    for key in location:
        annotation = model.model_fields[str(key)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return model
