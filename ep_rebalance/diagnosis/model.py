"""A checkpoint: whether it has experts, and whether they can be moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.diagnosis.settings import observes

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
        ("model", lambda: model(name, observes(settings))),
        ("architecture", lambda: architecture(name)),
    ]


def model(name: str, observed: bool = False) -> Iterator[Finding]:
    """Whether the model has experts, and whether its quantisation lets them be moved.

    observed: whether mode=observe is set, which moves nothing.
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
    quantisation = text.get("quantization_config") or config.get("quantization_config")
    yield _quantisation(quantisation, observed)


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


def _quantisation(found: Mapping[str, Any] | None, observed: bool) -> Finding:
    """As in `engines/vllm/checks.py`: experts of quantised models are not moved."""
    if not found:
        return Finding(check="quantisation", verdict="ok", found="none: experts can be moved")
    method = found.get("quant_method", "unknown method")
    if observed:
        return Finding(
            check="quantisation", verdict="ok", found=f"{method}: mode=observe moves no experts"
        )
    return Finding(
        check="quantisation",
        verdict="problem",
        found=f"{method}: moving its experts is not verified, so the server will not start",
        remedy="use mode=observe, or the unquantised checkpoint",
    )


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
