"""All EP ranks agree, when their devices are ready, on who is there and on whose settings hold.

Each rank puts its settings where all can read them and waits for the others'. No collective is used,
so that a process without the plugin, which does not take part, is found and named instead of being
waited for, and pairs with nothing of ours. Rank 0's settings hold for all: ranks that count steps
differently would enter different collectives.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ep_rebalance import __version__
from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.settings import load_config

logger = logging.getLogger(__name__)

_STORE = "torch.distributed.distributed_c10d:_get_default_store"

CONTRACTS = (Contract(_STORE),)


def agree(config: RebalanceConfig, ranks: list[int], store: dist.Store) -> RebalanceConfig:
    """Rank 0's settings, on every rank.

    config: this process's. ranks: global ranks of the EP group, in its order. store: one that all of
    them share.

    Raises ConfigurationError that names the ranks that did not answer within
    `attach.timeout_seconds`, or that run another version of the plugin; on all ranks that wait.
    """
    keys = [f"ep_rebalance/attach/{ranks[0]}/{rank}" for rank in range(len(ranks))]
    own = ranks.index(dist.get_rank())
    store.set(keys[own], json.dumps({"version": __version__, "config": config.as_dict()}))
    _wait_for(keys, store, config.attach.timeout_seconds)
    told = [json.loads(store.get(key)) for key in keys]
    _check_versions([entry["version"] for entry in told])
    agreed = load_config(told[0]["config"])
    if own == 0:
        for rank, entry in enumerate(told):
            for name, theirs, ours in _differences(entry["config"], told[0]["config"]):
                logger.warning(
                    "ep_rebalance: EP rank %d was started with %s=%r; rank 0's %r holds for all",
                    rank, name, theirs, ours,
                )  # fmt: skip
    return agreed


def default_store() -> dist.Store:
    """The store of the process group that vLLM made."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def _wait_for(keys: list[str], store: dist.Store, seconds: float) -> None:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            raise ConfigurationError(
                f"EP rank {', '.join(missing)} of {len(keys)} did not attach within "
                f"{seconds:g} s (attach.timeout_seconds).",
                "start every node and every data-parallel rank with --plugin ep_rebalance, with the "
                "package installed; raise attach.timeout_seconds if one only needs longer.",
            ) from None


def _check_versions(versions: list[str]) -> None:
    others = {rank: v for rank, v in enumerate(versions) if v != versions[0]}
    if others:
        named = ", ".join(f"rank {rank} runs {version}" for rank, version in others.items())
        raise ConfigurationError(
            f"EP rank 0 runs ep-rebalance {versions[0]}, but {named}.",
            "install one version on all nodes.",
        )


def _differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, their value, ours) of each setting that differs."""
    for name, value in ours.items():
        if isinstance(value, dict):
            yield from _differences(theirs[name], value, f"{prefix}{name}.")
        elif theirs[name] != value:
            yield f"{prefix}{name}", theirs[name], value
