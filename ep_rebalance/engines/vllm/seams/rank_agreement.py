"""Once their devices are ready, all EP ranks agree on who is there and on whose settings hold.

Each rank puts its settings where all can read them and waits for the others'. No collective is used:
a process without the plugin would not join it, and its next collective could be paired with ours. This
way it is found and named. Rank 0's settings hold for all, since ranks that count steps differently would
enter different collectives.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.version import __version__, source_digest

logger = logging.getLogger(__name__)

_STORE = "torch.distributed.distributed_c10d:_get_default_store"

CONTRACTS = (Contract(_STORE),)

_ONE_BUILD = (
    "install the same build of ep-rebalance on all nodes; `ep-rebalance doctor` shows its sources."
)


def agree(config: RebalanceConfig, ranks: list[int], store: dist.Store) -> RebalanceConfig:
    """Rank 0's settings, on every rank.

    config: this process's.
    ranks: global ranks of the EP group, in its order.
    store: one that all of them share.

    Raises ConfigurationError that names the ranks that did not answer within `attach.timeout_seconds`,
    or that run another plugin: of another version, from other sources, or with settings that others
    lack. If one rank raises, all do, since each also waits for the others' verdicts.
    """
    own, seconds = ranks.index(dist.get_rank()), config.attach.timeout_seconds
    # Named by the first rank: the store is the whole world's, which may hold several EP groups.
    said = _Board(f"settings of {ranks[0]}", store, len(ranks))
    found = _Board(f"verdicts of {ranks[0]}", store, len(ranks))
    said.post(own, {"version": __version__, "sources": source_digest(), "config": config.as_dict()})
    try:
        told = said.read(seconds)
        _check_alike(told)
    except ConfigurationError as error:
        found.post(own, [error.reason, error.remedy])
        raise
    found.post(own, None)
    for fault in found.read(seconds):
        if fault is not None:
            raise ConfigurationError(*fault)
    if own == 0:
        _log_differences([entry["config"] for entry in told])
    return load_config(told[0]["config"])


def default_store() -> dist.Store:
    """The store behind the world's process group, which vLLM made."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


class _Board:
    """A place where each rank posts one value for all to read."""

    def __init__(self, name: str, store: dist.Store, ranks: int) -> None:
        self._store = dist.PrefixStore(f"ep_rebalance {name}", store)
        self._keys = [str(rank) for rank in range(ranks)]

    def post(self, rank: int, what: Any) -> None:
        self._store.set(self._keys[rank], json.dumps(what))

    def read(self, seconds: float) -> list[Any]:
        """What each rank posted. Raises ConfigurationError that names those that posted nothing in time."""
        try:
            self._store.wait(self._keys, timedelta(seconds=seconds))
        except RuntimeError:  # DistStoreError
            missing = [key for key in self._keys if not self._store.check([key])]
            if missing:
                raise ConfigurationError(
                    f"EP rank {', '.join(missing)} of {len(self._keys)} did not attach within "
                    f"{seconds:g} s (attach.timeout_seconds).",
                    "start every node and every data-parallel rank with --plugin ep_rebalance, with the "
                    "package installed; raise attach.timeout_seconds if one only needs longer.",
                ) from None
        return [json.loads(self._store.get(key)) for key in self._keys]


def _check_alike(told: list[Mapping[str, Any]]) -> None:
    """Raises ConfigurationError for ranks whose plugin is not rank 0's.

    The version comes first: it explains most, and another version may post other keys.
    """
    _check_equal(told, "version", "install one version on all nodes.")
    keys_R = [set(_keys(entry)) for entry in told]
    for key in sorted(set().union(*keys_R)):
        lacking = [rank for rank, keys in enumerate(keys_R) if key not in keys]
        if lacking:
            raise ConfigurationError(
                f"EP rank {', '.join(map(str, lacking))} of {len(told)} says nothing about {key!r}, and "
                "others do: they run another ep-rebalance of the same version.",
                _ONE_BUILD,
            )
    _check_equal(told, "sources", _ONE_BUILD)


def _check_equal(told: list[Mapping[str, Any]], key: str, remedy: str) -> None:
    """Raises ConfigurationError unless all ranks that posted `key` posted the same value."""
    said = {rank: entry[key] for rank, entry in enumerate(told) if key in entry}
    first = min(said, default=0)
    others = {rank: value for rank, value in said.items() if value != said[first]}
    if others:
        named = ", ".join(f"rank {rank} runs {value}" for rank, value in others.items())
        what = "" if key == "version" else f" {__version__} of the {key}"
        raise ConfigurationError(
            f"EP rank {first} runs ep-rebalance{what} {said[first]}, but {named}.", remedy
        )


def _keys(entry: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of all settings, dotted where they lie in a section."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _log_differences(configs: list[dict[str, Any]]) -> None:
    for rank, config in enumerate(configs):
        for name, theirs, ours in _differences(config, configs[0]):
            logger.warning(
                "ep_rebalance: EP rank %d was started with %s=%r; rank 0's %r holds for all",
                rank,
                name,
                theirs,
                ours,
            )


def _differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, their value, our value) of each setting that differs."""
    for name, value in ours.items():
        if isinstance(value, dict):
            yield from _differences(theirs[name], value, f"{prefix}{name}.")
        elif theirs[name] != value:
            yield f"{prefix}{name}", theirs[name], value
