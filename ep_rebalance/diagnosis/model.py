"""A checkpoint: whether it has experts, and whether they can be moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.diagnosis.settings import served_with

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k")


def checks(name: str, settings: Path | None) -> list[tuple[str, Check]]:
    """(name, check) pairs for a model.

    name: a folder or a name on the Hugging Face Hub; "" for no model.
    settings: the file with the settings to serve it with; None for none.
    """
    if not name:
        return []
    return [
        ("model", lambda: model(name, served_with(settings))),
        ("architecture", lambda: architecture(name)),
    ]


def model(name: str, settings: RebalanceConfig | None = None) -> Iterator[Finding]:
    """Whether the model has experts, and whether its quantisation lets them be moved.

    settings: those that it is to be served with, None for the defaults.
    """
    try:
        config = _configuration(name)
    except Exception as error:  # transformers raises a dozen kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Finding(
            check="model",
            verdict="problem",
            found=f"the configuration of {name} cannot be read: {first}",
            remedy="name a folder with config.json, or a model in the local Hugging Face cache",
        )
        return
    text = config.get("text_config") or config
    experts, top_k = _first_number(text, _EXPERTS), _first_number(text, _TOP_K)
    shown = ", ".join(_architectures(config)) or "unknown architecture"
    if experts < 2:
        yield Finding(
            check="model",
            verdict="problem",
            found=f"{shown} without experts",
            remedy="serve it without --plugin ep_rebalance",
        )
        return
    yield Finding(check="model", verdict="ok", found=f"{shown}, {experts} experts, top {top_k}")
    yield from _quantisation(name, config, settings or RebalanceConfig())


def architecture(name: str) -> Iterator[Finding]:
    """Whether vLLM knows the architecture. No finding for a configuration that cannot be read, which
    `model` reports.
    """
    try:
        names = _architectures(_configuration(name))
    except Exception:  # as in `model`
        return
    if find_spec("vllm") is None:
        yield Finding(check="architecture", verdict="skipped", found="vLLM is not installed")
        return
    # By name: engines are a layer above this one, which may not import them.
    diagnosis: Any = import_module("ep_rebalance.engines.vllm.diagnosis")
    yield diagnosis.architecture(names)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """Names of the architecture. Some checkpoints give one name instead of a list."""
    names = config.get("architectures") or []
    return [names] if isinstance(names, str) else list(names)


def _first_number(text: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The first of these settings that the checkpoint has; 0 if it has none.

    Ernie's vision models give a list of equal numbers, as vLLM notes
    (vllm/transformers_utils/model_arch_config_convertor.py).
    """
    found = next((text[key] for key in keys if text.get(key)), 0)
    return int(found[0] if isinstance(found, list) else found)


def _quantisation(
    name: str, config: Mapping[str, Any], settings: RebalanceConfig
) -> Iterator[Finding]:
    text = config.get("text_config") or config
    found = text.get("quantization_config") or config.get("quantization_config")
    found = found or _beside_config(name, "hf_quant_config.json")
    if not found:
        yield Finding(check="quantisation", verdict="ok", found="none: experts can be moved")
    elif settings.mode == "observe":
        yield Finding(
            check="quantisation",
            verdict="ok",
            found=f"{found.get('quant_method', 'quantised')}: mode=observe moves no experts",
        )
    else:
        diagnosis: Any = import_module("ep_rebalance.engines.vllm.diagnosis")
        yield from diagnosis.quantisation(found, {**config, **text}, settings.quantisation)


def _configuration(name: str) -> dict[str, Any]:
    """The checkpoint's config.json. Not by `AutoConfig`, which may run code that comes with a checkpoint."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        local = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(local, dict):
            raise ValueError(f"config.json holds a {type(local).__name__}, not settings")
        return local
    transformers = import_module("transformers")
    found: dict[str, Any]
    found, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=True)
    return found


def _beside_config(name: str, file: str) -> dict[str, Any]:
    """What a file of the checkpoint holds; nothing if it is not there. ModelOpt had its settings in one of
    their own.
    """
    path: Any = Path(name) / file
    if not Path(name).is_dir():
        path = import_module("huggingface_hub").try_to_load_from_cache(name, file)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    held = json.loads(Path(path).read_text(encoding="utf-8"))
    return held if isinstance(held, dict) else {}
