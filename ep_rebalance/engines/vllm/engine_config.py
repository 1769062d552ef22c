"""Reads an engine's configuration: our settings in it, the model, and the size of the EP group."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.state import ModelIdentity

CONFIG_KEY = "ep_rebalance"
VERSION_KEY = "ep_rebalance_version"
"""Keys of `additional_config`, which reaches every process."""


def active_config(vllm_config: Any) -> RebalanceConfig:
    """Our part of an engine configuration that `seams/activation.py` has completed."""
    return load_config(vllm_config.additional_config[CONFIG_KEY])


def model_identity(
    vllm_config: Any,
    config: RebalanceConfig,
    moe_layers: tuple[int, ...] = (),
    model_config: Any = None,
) -> ModelIdentity:
    """What a saved placement must match. The hash leaves out where the checkpoint lies and what wrote it,
    so that a copy of it counts as the same model.

    moe_layers: the numbers of the layers that it is about; () before the model is loaded.
    model_config: of the drafter, if it is the model in question.
    """
    model = vllm_config.model_config if model_config is None else model_config
    settings = model.hf_text_config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(volatile, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return ModelIdentity(
        model=model.model,
        config_hash=hashlib.sha256(text.encode()).hexdigest(),
        experts=model.get_num_experts(),
        ep_size=ep_size(vllm_config.parallel_config),
        redundant_experts=config.planner.redundant_experts,
        moe_layers=moe_layers,
    )


def drafter_experts(vllm_config: Any) -> int:
    """Experts of each MoE layer of the drafter; 0 if there is none, or it is dense."""
    speculative = vllm_config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    # Where no model drafts (`ngram`, `custom_class`), vLLM has the target's configuration there.
    if draft is None or draft is getattr(speculative, "target_model_config", None):
        return 0
    return int(draft.get_num_experts())


def ep_size(parallel: Any) -> int:
    """Number of EP ranks: vLLM spreads experts over all tensor-, context- and data-parallel ranks."""
    return int(
        parallel.tensor_parallel_size
        * parallel.prefill_context_parallel_size
        * parallel.data_parallel_size
    )


def no_experts(model: str) -> ConfigurationError:
    """The error for a model without experts, to be raised by whoever finds it out first.

    Of some models that have experts vLLM does not read how many (DBRX names them by a key of its own).
    """
    return ConfigurationError(
        f"vLLM finds no Mixture-of-Experts layers in model {model!r}.",
        "serve it without --plugin ep_rebalance and --enable-expert-parallel.",
    )
