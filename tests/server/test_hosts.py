"""Hosts: their links, what ranks measure of them, and a host without the plugin. No server gets to serve."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from engines import V032
from hosts import GIGABIT, Host, Network, network, why_not
from serving import PLUGIN
from serving_on_hosts import start_on

pytestmark = [*V032.marks, pytest.mark.hosts]

TENTH = GIGABIT // 10
TAKING_TURNS = 2
"""gloo may send to a rank and receive from it in turn: two ranks that send to each other have half of what a
cable carries each way, or more. In a ring of three they have all of it.
"""
TOLERANCE = 0.3
MEASURE = [sys.executable, "-P", str(Path(__file__).with_name("rank_on_host.py"))]
TRAFFIC = [sys.executable, str(Path(__file__).with_name("traffic_between_hosts.py"))]
OBSERVE = ("--ep-rebalance-config.mode", "observe")
LIMIT = 15.0


@pytest.fixture
def listening(two_hosts: Network) -> Iterator[Host]:
    """The second host, which takes and sends back what the first one sends."""
    _, second = two_hosts.hosts
    command = [*second.enter, *TRAFFIC, "listen"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield second
        process.kill()


def test_a_link_has_the_bandwidth_and_the_losses_that_were_asked_for(
    two_hosts: Network, listening: Host
) -> None:
    first = two_hosts.hosts[0]
    two_hosts.limit(GIGABIT // 10)
    assert float(first.run(*TRAFFIC, "stream", listening.address, "4")) == pytest.approx(
        GIGABIT // 10, rel=0.15
    )
    two_hosts.limit(GIGABIT)
    for share, least, most in ((0.05, 1700, 1900), (1.0, 0, 0), (0.0, 2000, 2000)):
        two_hosts.lose(listening, share)  # there and back
        assert least <= int(first.run(*TRAFFIC, "datagrams", listening.address, "2000")) <= most


@pytest.mark.parametrize(("ranks", "least"), [(2, TENTH / 8 / TAKING_TURNS), (3, TENTH / 8)])
def test_links_are_measured_as_fast_as_they_are(ranks: int, least: float) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with network(ranks, bits_per_second=TENTH) as joined, ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*host.enter, *MEASURE, str(rank), str(ranks), joined.hosts[0].address],
                    env={**os.environ, **V032.environment(), **host.environment},
                    stdout=subprocess.PIPE,
                )
            )
            for rank, host in enumerate(joined.hosts)
        ]
        (measured,) = {float(process.communicate(timeout=120)[0]) for process in processes}
    assert (1 - TOLERANCE) * least < measured < (1 + TOLERANCE) * TENTH / 8


def test_a_host_without_the_plugin_is_named(two_hosts: Network, tmp_path: Path) -> None:
    """In mode observe, where the configurations of the engines do not differ."""
    settings = (*PLUGIN, *OBSERVE, "--ep-rebalance-config.attach.timeout_seconds", f"{LIMIT:g}")
    processes, (log, _) = start_on(
        two_hosts.hosts,
        tmp_path / "named.log",
        *settings,
        elsewhere=("--enable-expert-parallel",),
    )
    try:
        assert processes[0].wait() != 0
    finally:
        for process in processes:
            process.stop()
    assert f"EP rank 1 of 2 did not attach within {LIMIT:g} s" in log.read_text(errors="replace")
