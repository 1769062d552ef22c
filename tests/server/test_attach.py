"""Two data-parallel ranks that were started apart, as on two nodes: without the plugin on one of them, and
with other settings.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cpu_server import START_SECONDS, cpu_environment, free_port
from engines import V032
from serving import TINY_MOE

pytestmark = V032.marks

SCRIPT = Path(__file__).with_name("offline_rank.py")
LIMIT = 15.0
OBSERVE = {"mode": "observe", "attach": {"timeout_seconds": LIMIT}}


class Rank:
    """One of the two processes, with all that it starts."""

    def __init__(self, rank: int, port: int, additional_config: dict[str, Any], log: Path) -> None:
        environment = {
            **cpu_environment(1),
            **V032.environment(),
            "VLLM_CPU_OMP_THREADS_BIND": str(sorted(os.sched_getaffinity(0))[rank]),
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": "0",
            "VLLM_DP_SIZE": "2",
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(TINY_MOE), json.dumps(additional_config)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait(self) -> int:
        return self.process.wait(START_SECONDS)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path):
    """Starts both ranks with the `additional_config` of each."""
    started: list[Rank] = []

    def start(*additional_configs: dict[str, Any]) -> list[Rank]:
        port = free_port()
        for rank, additional in enumerate(additional_configs):
            started.append(Rank(rank, port, additional, tmp_path / f"{rank}.log"))
        return started

    yield start
    for rank in started:
        rank.end()


def test_a_rank_without_the_plugin_is_named(start) -> None:
    """In mode observe, where the configurations of the engines do not differ."""
    with_plugin, without = start({"ep_rebalance": OBSERVE}, {})
    assert with_plugin.wait() != 0
    assert f"EP rank 1 of 2 did not attach within {LIMIT:g} s" in with_plugin.text()
    assert "start every node and every data-parallel rank with --plugin" in with_plugin.text()
    assert without.process.poll() is None or "ep_rebalance" not in without.text()


def test_the_configuration_of_rank_0_wins(start) -> None:
    windows = [{"window": {"snapshot_steps": steps}} for steps in (3, 11)]
    ranks = start(*({"ep_rebalance": {**OBSERVE, **window}} for window in windows))
    for rank in ranks:
        assert rank.wait() == 0, rank.text()[-6000:]
        *_, line = (line for line in rank.text().splitlines() if line.startswith("{"))
        status = json.loads(line)
        assert status["config"]["window"]["snapshot_steps"] == 3
    told = "EP rank 1 was started with window.snapshot_steps=11; rank 0's 3 holds for all"
    assert told in ranks[0].text()
