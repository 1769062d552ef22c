"""Ranks agree on rank 0's settings before the model is loaded, and name those that are not there."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.vllm.seams import rank_agreement
from ep_rebalance.engines.vllm.seams.rank_agreement import agree, default_store
from ep_rebalance.version import __version__, source_digest

BOTH = [0, 1]


def store_of(name):
    return dist.PrefixStore(name, default_store())


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def agree_on_steps(rank, name, steps_of_rank):
    lines = Lines()
    rank_agreement.logger.addHandler(lines)
    config = load_config({"window": {"snapshot_steps": steps_of_rank[rank]}})
    try:
        agreed = agree(config, BOTH, store_of(name))
    finally:
        rank_agreement.logger.removeHandler(lines)
    return agreed, lines.texts


def test_rank_0s_settings_hold_for_all_and_what_differs_is_logged(two_ranks: Ranks):
    (ours, told), (theirs, nothing) = two_ranks.run(agree_on_steps, "differ", (4, 9))
    assert ours == theirs == load_config({"window": {"snapshot_steps": 4}})
    assert told == [
        "ep_rebalance: EP rank 1 was started with window.snapshot_steps=9; rank 0's 4 holds for all"
    ]
    assert nothing == []


def test_equal_settings_are_not_worth_a_line(two_ranks: Ranks):
    (_, told), (_, nothing) = two_ranks.run(agree_on_steps, "equal", (4, 4))
    assert told == nothing == []


def attach_without(rank, missing):
    """The rank that has no plugin does nothing at all."""
    if rank == missing:
        return None
    began = time.monotonic()
    config = load_config({"attach": {"timeout_seconds": 0.5}})
    with pytest.raises(ConfigurationError) as raised:
        agree(config, BOTH, store_of(f"without {missing}"))
    return raised.value.reason, raised.value.remedy, time.monotonic() - began


@pytest.mark.parametrize("missing", BOTH)
def test_a_rank_without_the_plugin_is_named_within_the_time_limit(two_ranks: Ranks, missing):
    reason, remedy, seconds = two_ranks.run(attach_without, missing)[1 - missing]
    assert f"EP rank {missing} of 2 did not attach within 0.5 s" in reason
    assert "--plugin ep_rebalance" in remedy
    assert seconds < 20


def attach_late(rank):
    """Rank 1 comes when rank 0 has given up."""
    store = store_of("late")
    if rank == 1:
        store.wait(["ep_rebalance verdicts of 0/0"])
    with pytest.raises(ConfigurationError) as raised:
        agree(load_config({"attach": {"timeout_seconds": 0.5}}), BOTH, store)
    return raised.value.reason


def test_a_rank_that_is_late_does_not_go_on_alone(two_ranks: Ranks):
    for reason in two_ranks.run(attach_late):
        assert "EP rank 1 of 2 did not attach within 0.5 s" in reason


def attach_with_versions(rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_agreement, "__version__", f"0.{rank}.0")
        with pytest.raises(ConfigurationError) as raised:
            agree(load_config(), BOTH, store_of("versions"))
    return raised.value.reason


def test_another_version_of_the_plugin_is_refused_on_all_ranks(two_ranks: Ranks):
    for reason in two_ranks.run(attach_with_versions):
        assert "rank 0 runs ep-rebalance 0.0.0, but rank 1 runs 0.1.0" in reason


def attach_from_other_sources(rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_agreement, "source_digest", lambda: f"5eed{rank}")
        with pytest.raises(ConfigurationError) as raised:
            agree(load_config(), BOTH, store_of("sources"))
    return raised.value.reason, raised.value.remedy


def test_other_sources_of_the_same_version_are_refused_on_all_ranks(two_ranks: Ranks):
    for reason, remedy in two_ranks.run(attach_from_other_sources):
        assert f"rank 0 runs ep-rebalance {__version__} of the sources 5eed0" in reason
        assert "rank 1 runs 5eed1" in reason
        assert "install the same build of ep-rebalance on all nodes" in remedy


def attach_beside(rank, name, other):
    """Rank 1 posts `other` instead of what ours would, as another build of the plugin may."""
    post = rank_agreement._Board.post

    def post_other(board, own, what):
        post(board, own, other if isinstance(what, dict) else what)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(rank_agreement._Board, "post", post_other)
        with pytest.raises(ConfigurationError) as raised:
            agree(load_config(), BOTH, store_of(name))
    return raised.value.reason, raised.value.remedy


SETTINGS = load_config().as_dict()
OURS = {"version": __version__, "sources": source_digest(), "config": SETTINGS}


@pytest.mark.parametrize(
    ("other", "key", "lacking"),
    [
        pytest.param(OURS | {"more": 1}, "more", 0, id="says more"),
        pytest.param({"version": __version__, "config": SETTINGS}, "sources", 1, id="says less"),
        pytest.param({}, "config.", 1, id="says nothing"),
        pytest.param(
            OURS | {"config": {**SETTINGS, "colour": "red"}}, "config.colour", 0, id="has a setting"
        ),
        pytest.param(
            OURS | {"config": {**SETTINGS, "window": {}}}, "config.window.", 1, id="lacks a section"
        ),
    ],
)
def test_a_rank_that_says_other_things_is_named_on_all_ranks(two_ranks: Ranks, other, key, lacking):
    for reason, remedy in two_ranks.run(attach_beside, f"beside {key} {len(other)}", other):
        assert f"EP rank {lacking} of 2 says nothing about '{key}" in reason
        assert "another ep-rebalance" in reason
        assert "install the same build" in remedy


def test_a_rank_of_another_version_is_told_by_its_version_whatever_it_says(two_ranks: Ranks):
    for reason, remedy in two_ranks.run(attach_beside, "old", {"version": "0.0.1"}):
        assert f"EP rank 0 runs ep-rebalance {__version__}, but rank 1 runs 0.0.1" in reason
        assert "install one version on all nodes" in remedy


def test_sources_are_read_once():
    assert source_digest() is source_digest()


class CountingStore:
    """Counts the requests of all that share a store; `PrefixStore` hides them."""

    def __init__(self, asked, name, store):
        self._asked, self._store = asked, PREFIXED(name, store)

    def __getattr__(self, name):
        self._asked.append(name)
        return getattr(self._store, name)


PREFIXED = dist.PrefixStore


def requests_of(num_ranks, monkeypatch):
    """Of all ranks together, which are threads here."""
    asked, here, store = [], threading.local(), dist.HashStore()
    monkeypatch.setattr(dist, "get_rank", lambda: here.rank)
    monkeypatch.setattr(dist, "PrefixStore", lambda *of: CountingStore(asked, *of))

    def agreed(rank):
        here.rank = rank
        config = load_config({"window": {"snapshot_steps": 4 + rank}})
        return agree(config, list(range(num_ranks)), store).window.snapshot_steps

    with ThreadPoolExecutor(num_ranks) as pool:
        assert list(pool.map(agreed, range(num_ranks))) == [4] * num_ranks
    return len(asked)


def test_requests_grow_with_the_ranks_and_not_with_their_square(monkeypatch):
    assert requests_of(32, monkeypatch) <= 8 * requests_of(4, monkeypatch)


def come_late(rank):
    """Rank 0 comes when rank 1 has given up."""
    store = store_of("rank 0 late")
    if rank == 0:
        store.wait(["ep_rebalance verdicts of 0/1"])
    with pytest.raises(ConfigurationError) as raised:
        agree(load_config({"attach": {"timeout_seconds": 0.5}}), BOTH, store)
    return raised.value.reason


def test_rank_0_does_not_go_on_without_a_rank_that_has_given_up(two_ranks: Ranks):
    for reason in two_ranks.run(come_late):
        assert "EP rank 0 of 2 did not attach within 0.5 s" in reason


def test_a_rank_that_dies_amid_it_is_named_by_all_others(monkeypatch):
    here, store = threading.local(), dist.HashStore()
    monkeypatch.setattr(dist, "get_rank", lambda: here.rank)
    config = load_config({"attach": {"timeout_seconds": 0.4}})
    said = {"version": __version__, "sources": source_digest(), "config": config.as_dict()}
    rank_agreement._Boards.of(store, [0, 1, 2], 0.4).said.post(2, said)

    def fault_of(rank):
        here.rank = rank
        with pytest.raises(ConfigurationError) as raised:
            agree(config, [0, 1, 2], store)
        return raised.value.reason

    with ThreadPoolExecutor(2) as pool:
        for reason in pool.map(fault_of, BOTH):
            assert "EP rank 2 of 3 did not attach within 0.4 s" in reason
