"""Keeps our settings out of the key of vLLM's compile cache.

Target: `VllmConfig.additional_config`, which may be a mapping or an object with its own `compute_hash`
(vllm/config/utils.py, `SupportsHash`). Why: the hash of a plain dictionary covers every setting, so a
longer window would recompile the model. Only what changes the traced model may count.
"""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from typing import Any

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.engine_config import CONFIG_KEY, VERSION_KEY

CONTRACTS = (Contract("vllm.config.utils:SupportsHash.compute_hash"),)


class HashedSettings(UserDict[str, Any]):
    """`additional_config` with a hash of only what the compiled model depends on."""

    def compute_hash(self) -> str:
        """Covers the plugin's version, whether experts move, the data plane, and all keys of others."""
        config: RebalanceConfig = load_config(self[CONFIG_KEY])
        factors = {
            "version": self[VERSION_KEY],
            "moves_experts": config.mode != "observe",
            "data_plane": config.data_plane.model_dump(mode="json"),
            "others": {k: v for k, v in self.items() if k not in (CONFIG_KEY, VERSION_KEY)},
        }
        text = json.dumps(factors, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()
