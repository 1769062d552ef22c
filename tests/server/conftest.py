"""Servers that several tests share; each takes about a minute to start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from engines import GPU_TOKEN_PATHS
from hosts import GIGABIT, Network, network, why_not
from serving import (
    DATA_PARALLEL,
    OPERATOR,
    PLUGIN,
    SETTINGS,
    STARTS,
    TENSOR_PARALLEL,
    Server,
    prompts,
    serving,
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each server cost, and how many tests it served."""
    if not STARTS:
        return
    terminalreporter.section("servers")
    for start in STARTS:
        fixture = start.name.partition("-")[0]
        served = sum(
            fixture in item.fixturenames and start.name.partition("-")[2] in item.name
            for item in terminalreporter._session.items
        )
        terminalreporter.write_line(
            f"{start.seconds:6.0f} s  {start.name}, vLLM {start.engine.name}: {served or 1} tests"
        )
    terminalreporter.write_line(f"{sum(start.seconds for start in STARTS):6.0f} s  all starts")


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def settings_file(logs: Path) -> str:
    path = logs / "rebalance.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """The fixed prompts whose greedy answers must never change: 5 of each domain."""
    return prompts(per_domain=5)


@dataclass(frozen=True)
class OneRank:
    """What vLLM answers without us."""

    answers: list[list[int]]
    log_probabilities: list[list[dict[str, float]]]


@pytest.fixture(scope="session")
def one_rank(logs: Path, questions: list[str]) -> OneRank:
    with serving(logs / "one_rank.log", "--enforce-eager", ranks=1) as server:
        return OneRank(server.answers(questions), server.log_probabilities(questions))


@pytest.fixture(scope="session")
def one_rank_answers(one_rank: OneRank) -> list[list[int]]:
    return one_rank.answers


@pytest.fixture(scope="session")
def operators_key(logs: Path) -> str:
    """A file that holds OPERATOR."""
    path = logs / "operators_key"
    path.write_text(f"{OPERATOR}\n")
    return str(path)


@pytest.fixture(scope="session")
def traces(logs: Path) -> Path:
    """Where the data-parallel server records its load."""
    folder = logs / "traces"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def data_parallel(
    logs: Path, settings_file: str, traces: Path, operators_key: str
) -> Iterator[Server]:
    control = {"enabled": True, "api_key_file": operators_key}
    records = {"trace": {"path": str(traces)}, "control": control}
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    arguments += ("--ep-rebalance-config", json.dumps(records))
    with serving(logs / "data_parallel.log", *arguments, plugins=[GPU_TOKEN_PATHS]) as server:
        yield server


@pytest.fixture(scope="module")
def tensor_parallel(logs: Path, settings_file: str, one_rank: OneRank) -> Iterator[Server]:
    """Starts after `one_rank` has ended: an idle server keeps the cores from another one."""
    arguments = (*TENSOR_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    arguments += ("--ep-rebalance-config.planner.redundant_experts", "4")
    with serving(logs / "tensor_parallel.log", *arguments, plugins=[GPU_TOKEN_PATHS]) as server:
        yield server


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network(2, bits_per_second=GIGABIT) as joined:
        yield joined
