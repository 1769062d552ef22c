"""Files of a checkpoint: config.json, and ModelOpt's hf_quant_config.json beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_rebalance.config import ConfigurationError
from ep_rebalance.printable import printable
from ep_rebalance.regular_files import read_regular

Settings = Mapping[str, Any]

_CONFIG, _QUANTISATION = "config.json", "hf_quant_config.json"
_MAX_BYTES = 16 << 20
_LANGUAGE_MODELS = (
    "thinker_config",
    "text_config",
    "llm_config",
    "language_config",
)
"""Where models with several parts keep the settings of the one that answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The configuration of a checkpoint.

    folder: that holds config.json.
    config: config.json.
    quantisation: how its weights are quantised, as the file has it; {} if they are not.
    """

    folder: Path
    config: Settings
    quantisation: Settings

    @property
    def architectures(self) -> tuple[str, ...]:
        """Some checkpoints give one name instead of a list."""
        names = self.config.get("architectures")
        if isinstance(names, str):
            return (names,)
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def text(self) -> Settings:
        """The settings of its language model."""
        return text_of(self.config)


def text_of(config: Settings) -> Settings:
    """The part of a configuration that describes the language model: all of it, or a nested part."""
    for name in _LANGUAGE_MODELS:
        nested = config.get(name)
        if isinstance(nested, Mapping) and nested:
            return text_of(nested)
    return config


def read_checkpoint(name: str) -> Checkpoint:
    """Read a configuration.

    name: a folder, its config.json, or the name of a model in the local Hugging Face cache.

    Raises ConfigurationError.
    """
    try:
        path = _config_path(name)
        config = _read(path)
        beside = path.parent / _QUANTISATION
        # As vLLM has it: the root first, then ModelOpt's file, then the language model's part
        # (vllm/transformers_utils/config.py, model_arch_config_convertor.py).
        found = (
            config.get("quantization_config")
            or (_read(beside) if beside.is_file() else None)
            or config.get("compression_config")
            or text_of(config).get("quantization_config")
            or {}
        )
        if not isinstance(found, Mapping):
            raise ValueError(f"its quantisation is {found!r:.50}, not a table of settings")
    except (OSError, ValueError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigurationError(
            f"the configuration of {name} cannot be read: {first}.",
            f"name a folder with {_CONFIG}, or a model in the local Hugging Face cache.",
        ) from None
    return Checkpoint(folder=path.parent, config=config, quantisation=found)


def _config_path(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        if not (path / _CONFIG).exists():
            raise OSError(f"the folder holds no {_CONFIG}")
        return path / _CONFIG
    if path.suffix == ".json" or path.exists():
        return path
    # Only looks at files that are here: nothing is fetched, and no code of a checkpoint is run.
    found = import_module("huggingface_hub").try_to_load_from_cache(name, _CONFIG)
    if not isinstance(found, str):
        raise OSError(f"there is no such folder, and the local cache has no {_CONFIG} of that name")
    return Path(found)


def _read(path: Path) -> Settings:
    """Raises OSError and ValueError."""
    try:
        # Some editors begin a file with a byte order mark.
        held = printable(json.loads(read_regular(path, _MAX_BYTES).decode("utf-8-sig")))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path.name} holds a {type(held).__name__}, not settings")
    return held
