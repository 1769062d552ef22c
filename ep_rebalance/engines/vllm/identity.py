"""What is served: the model, as a saved placement must match it, and the size of the EP group."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.state import ModelIdentity


def model_identity(vllm_config: Any, config: RebalanceConfig) -> ModelIdentity:
    """What a saved placement must match; the hash leaves out where the checkpoint lies and who
    wrote it.
    """
    settings = vllm_config.model_config.hf_text_config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(volatile, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return ModelIdentity(
        model=vllm_config.model_config.model,
        config_hash=hashlib.sha256(text.encode()).hexdigest(),
        experts=vllm_config.model_config.get_num_experts(),
        ep_size=ep_size(vllm_config.parallel_config),
        redundant_experts=config.planner.redundant_experts,
    )


def ep_size(parallel: Any) -> int:
    """Expert-parallel ranks: vLLM spreads experts over tensor, context and data parallel ranks."""
    return int(
        parallel.tensor_parallel_size
        * parallel.prefill_context_parallel_size
        * parallel.data_parallel_size
    )
