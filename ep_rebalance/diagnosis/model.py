"""A checkpoint: experts, and whether they can be moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.diagnosis.settings import observes

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k")


def checks(name: str, settings: Path | None) -> list[tuple[str, Check]]:
    """Of a folder or a name on the Hugging Face Hub, "" for none, to be served with these settings."""
    return [("model", lambda: model(name, observes(settings)))] if name else []


def model(name: str, observed: bool = False) -> Iterator[Finding]:
    """observed: mode=observe is set, which moves nothing."""
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
    experts = next((int(text[key]) for key in _EXPERTS if text.get(key)), 0)
    top_k = next((int(text[key]) for key in _TOP_K if text.get(key)), 0)
    architecture = ", ".join(config.get("architectures") or ["unknown architecture"])
    if experts < 2:
        yield Finding(
            check="model",
            verdict="problem",
            found=f"{architecture} without experts",
            remedy="serve it without --plugin ep_rebalance",
        )
        return
    yield Finding(
        check="model", verdict="ok", found=f"{architecture}, {experts} experts, top {top_k}"
    )
    quantisation = text.get("quantization_config") or config.get("quantization_config")
    yield _quantisation(quantisation, observed)


def _quantisation(found: Mapping[str, Any] | None, observed: bool) -> Finding:
    """As `engines/vllm/activation.py` has it: experts of quantised models are not moved."""
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
    """As written in the checkpoint: `AutoConfig` would offer to run code that comes with it."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        local: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return local
    transformers = import_module("transformers")
    found: dict[str, Any]
    found, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=True)
    return found
