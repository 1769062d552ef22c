"""Which exchanges can be part of CUDA graphs, and what is proposed where one cannot."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.vllm import data_plane
from ep_rebalance.exchanges import EXCHANGES, Exchange

ANYWHERE = Exchange(name="anywhere", summary="", all_to_all="", in_graphs="always")


def refusal(name: str, *, shared: bool) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as raised:
        data_plane._check_graphs(data_plane.EXCHANGES[name], tokens_are_shared=shared)
    return raised.value


def test_rows_that_are_counted_on_the_host_go_into_no_graph() -> None:
    error = refusal("exact", shared=False)
    assert "data_plane.buffers=exact reads numbers of rows on the host" in error.reason
    assert error.remedy == "set data_plane.buffers=fixed, or --enforce-eager."
    assert refusal("exact", shared=True).remedy == "set --enforce-eager."


def test_buffers_of_one_size_need_equal_tokens() -> None:
    data_plane._check_graphs(EXCHANGES["fixed"], tokens_are_shared=False)
    error = refusal("fixed", shared=True)
    assert "data_plane.buffers=fixed in CUDA graphs needs equally many tokens" in error.reason
    assert error.remedy == "set --enforce-eager, or use data parallelism alone."


@pytest.mark.parametrize("shared", [False, True])
def test_an_added_exchange_is_checked_and_proposed(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    both = MappingProxyType({**EXCHANGES, ANYWHERE.name: ANYWHERE})
    monkeypatch.setattr(data_plane, "EXCHANGES", both)
    data_plane._check_graphs(ANYWHERE, tokens_are_shared=shared)
    fitting = "anywhere" if shared else "fixed or anywhere"
    remedy = f"set data_plane.buffers={fitting}, or --enforce-eager."
    assert refusal("exact", shared=shared).remedy == remedy
