"""Once their devices are ready, all EP ranks agree on who is there and on whose settings hold.

Each rank puts its settings where all can read them and waits for the others'. No collective is used:
a process without the plugin would not join it, and its next collective could be paired with ours. This
way it is found and named. Rank 0's settings hold for all, since ranks that count steps differently would
enter different collectives.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    Only rank 0 reads what each of the others posts, and they read what it found. If all read all, a
    thousand ranks would ask one store for millions of values.

    Raises ConfigurationError that names the ranks that did not answer within `attach.timeout_seconds`,
    or that run another plugin: of another version, from other sources, or with settings that others
    lack. If one rank raises, all do: rank 0 also waits for the others' verdicts, and they for its own.
    """
    own, seconds = ranks.index(dist.get_rank()), config.attach.timeout_seconds
    boards = _Boards.of(store, ranks, seconds)
    boards.said.post(
        own, {"version": __version__, "sources": source_digest(), "config": config.as_dict()}
    )
    fault: ConfigurationError | None = None
    answer: dict[str, Any] = {}
    try:
        answer = _hear_all(boards) if own == 0 else _hear_rank_0(boards)
    except ConfigurationError as error:
        fault = error
    boards.found.post(own, None if fault is None else [fault.reason, fault.remedy])
    if fault is not None:
        raise fault
    _raise_if_any_did(boards, own)
    return load_config(answer)


def default_store() -> dist.Store:
    """The store behind the world's process group, which vLLM made."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def _hear_all(boards: _Boards) -> dict[str, Any]:
    """Rank 0's settings, once it has heard all others, and told them."""
    try:
        told = boards.said.read()
        _check_alike(told)
    except ConfigurationError as error:
        boards.answer.post(0, [error.reason, error.remedy])
        raise
    config: dict[str, Any] = told[0]["config"]
    boards.answer.post(0, config)
    _log_differences([entry["config"] for entry in told])
    return config


def _hear_rank_0(boards: _Boards) -> dict[str, Any]:
    """The same on the other ranks."""
    boards.said.expect([0])
    answer = boards.answer.read(times=2)[0]  # rank 0 may have come when this rank had waited
    if isinstance(answer, list):
        raise ConfigurationError(*answer)
    return dict(answer)


def _raise_if_any_did(boards: _Boards, own: int) -> None:
    """Raises ConfigurationError on all ranks if one of them has raised one."""
    if own == 0:
        boards.last.post(0, _first_verdict(boards))
    if (fault := boards.last.read(times=4)[0]) is not None:
        raise ConfigurationError(*fault)


def _first_verdict(boards: _Boards) -> list[str] | None:
    """Why some rank does not go on, or posted nothing; None if all go on."""
    try:
        found = boards.found.read(times=2)
    except ConfigurationError as error:
        return [error.reason, error.remedy]
    return next((fault for fault in found if fault is not None), None)


@dataclass(frozen=True, slots=True)
class _Boards:
    """What ranks tell each other, in this order.

    said: each its settings. answer: rank 0 its own, or why not all go on.
    found: each why it does not go on, or nothing. last: rank 0 the first of these.
    """

    said: _Board
    answer: _Board
    found: _Board
    last: _Board

    @classmethod
    def of(cls, store: dist.Store, ranks: list[int], seconds: float) -> _Boards:
        # Named by the first rank: the store is the whole world's, which may hold several EP groups.
        everyone = list(map(str, range(len(ranks))))

        def board(name: str, keys: list[str]) -> _Board:
            inner = dist.PrefixStore(f"ep_rebalance {name} of {ranks[0]}", store)
            return _Board(inner, keys, len(ranks), seconds)

        return cls(
            said=board("settings", everyone),
            answer=board("answer", everyone[:1]),
            found=board("verdicts", everyone),
            last=board("last verdict", everyone[:1]),
        )


class _Board:
    """A place where each of the ranks `keys` posts one value for all to read.

    num_ranks: of the EP group. seconds: of `attach.timeout_seconds`.
    """

    def __init__(self, store: dist.Store, keys: list[str], num_ranks: int, seconds: float) -> None:
        self._store, self._keys = store, keys
        self._num_ranks, self._seconds = num_ranks, seconds

    def post(self, rank: int, what: Any) -> None:
        self._store.set(self._keys[rank], json.dumps(what))

    def read(self, times: int = 1) -> list[Any]:
        """What each rank posted; raises as `expect` does."""
        self.expect(range(len(self._keys)), times)
        return [json.loads(self._store.get(key)) for key in self._keys]

    def expect(self, ranks: Sequence[int], times: int = 1) -> None:
        """Wait for what these post, `times` the time limit. Raises ConfigurationError that names all that
        posted nothing.
        """
        limit = timedelta(seconds=times * self._seconds)
        try:
            self._store.wait([self._keys[rank] for rank in ranks], limit)
        except RuntimeError:  # DistStoreError
            missing = [key for key in self._keys if not self._store.check([key])]
            if missing:
                raise ConfigurationError(
                    f"EP rank {', '.join(missing)} of {self._num_ranks} did not attach within "
                    f"{self._seconds:g} s (attach.timeout_seconds).",
                    "start every node and every data-parallel rank with --plugin ep_rebalance, with the "
                    "package installed; raise attach.timeout_seconds if one only needs longer.",
                ) from None


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
