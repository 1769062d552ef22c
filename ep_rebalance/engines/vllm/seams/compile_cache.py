"""Keeps our settings out of the key of vLLM's compile cache.

Target: `VllmConfig.additional_config`, which may be a mapping or something with a hash of its own
(vllm/config/utils.py, `SupportsHash`). Why: the hash of a plain dictionary takes in every setting, so
that a longer window would compile the model anew. Only what changes the traced model counts.
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
    """`additional_config` with a hash that only what the compiled model depends on changes."""

    def compute_hash(self) -> str:
        """Of the plugin's version, of whether experts move and of who carries and computes them, and of
        all that is not ours.
        """
        config: RebalanceConfig = load_config(self[CONFIG_KEY])
        factors = {
            "version": self[VERSION_KEY],
            "moves_experts": config.mode != "observe",
            "data_plane": config.data_plane.model_dump(mode="json"),
            "others": {k: v for k, v in self.items() if k not in (CONFIG_KEY, VERSION_KEY)},
        }
        text = json.dumps(factors, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()
