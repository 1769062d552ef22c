"""What fails between two hosts, or with one of them, amid a migration: the server goes on or ends as vLLM
without us does. docs/nodes.md has the figures, which are logged (--log-cli-level=INFO).
"""

from __future__ import annotations

import itertools
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from engines import GPU_TOKEN_PATHS, V032
from hosts import GIGABIT, Network, network, why_not
from serving import PLUGIN, SETTINGS, Server, prompts_by_domain
from serving_on_hosts import OnHosts, serving_on

pytestmark = [*V032.marks, pytest.mark.hosts]
logger = logging.getLogger(__name__)

LOSS, LOSS_SECONDS = 0.05, 20.0
STALL_SECONDS = 30.0
PATIENCE_SECONDS = 180.0
MIGRATION_SECONDS = 20.0
UNEVEN_PARTS_ONLY = "GPU_TOKEN_PATHS_UNEVEN_PARTS_ONLY"
CLIENTS = 4
TOKENS = 8
RETRANSMISSIONS = 6
"""After which TCP gives a connection up: in about 25 s. With Linux's 15 it takes a quarter of an hour."""


@dataclass(frozen=True, slots=True)
class Asked:
    """answer: an HTTP status, or "none" if the connection broke. Times are of time.monotonic."""

    began: float
    ended: float
    answer: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """goes_on: whether requests are answered after the fault.

    answers: what requests got that were asked, or waiting, during the fault and until its end.
    seconds: from the fault's end to the first answer to what was asked after it; if the server ended, from
        its beginning to that.
    """

    goes_on: bool
    answers: dict[str, int]
    seconds: float
    slowest_seconds: float


@dataclass
class Clients:
    """Ask one request after the other, and never stop for an error."""

    server: Server
    asked: list[Asked] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, first: int) -> None:
        texts = list(itertools.chain.from_iterable(prompts_by_domain()))
        for text in itertools.cycle(texts[first:] + texts[:first]):
            if self.stopped.is_set():
                return
            began = time.monotonic()
            try:
                self.server.answer(text)
                answer = "200"
            except httpx.HTTPStatusError as error:
                answer = str(error.response.status_code)
            except httpx.TransportError:
                answer = "none"
                self.stopped.wait(0.5)
            self.asked.append(Asked(began, time.monotonic(), answer))

    def outcome(self, began: float, ended: float, *, goes_on: bool, seconds: float) -> Outcome:
        during = [one for one in self.asked if one.ended >= began and one.began <= ended]
        answers = sorted({one.answer for one in during})
        return Outcome(
            goes_on=goes_on,
            answers={kind: sum(one.answer == kind for one in during) for kind in answers},
            seconds=round(seconds, 1),
            slowest_seconds=round(max((one.ended - one.began for one in during), default=0.0), 1),
        )


@contextmanager
def clients(server: Server) -> Iterator[Clients]:
    asking = Clients(server)
    threads = [threading.Thread(target=asking.ask, args=(40 * n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield asking
    finally:
        asking.stopped.set()
        server.process.stop()  # what still waits for an answer gets none
        for thread in threads:
            thread.join()


@contextmanager
def served(folder: Path, name: str, *, plugin: bool) -> Iterator[tuple[Network, OnHosts]]:
    """On two hosts. A byte budget of 4 kB a step makes a migration long enough to be hit in the middle."""
    if reason := why_not():
        pytest.skip(reason)
    file = folder / f"{name}.yaml"
    settings = SETTINGS | {"migration": {"max_bytes_per_step": 4096}}
    file.write_text(yaml.safe_dump(settings))
    # vLLM's own experts for CPUs crash on expert parallelism: without the plugin each rank has a part of
    # every expert, and the same collectives.
    arguments = (*PLUGIN, "--ep-rebalance-config", str(file)) if plugin else ()
    # vLLM on CPU has no `all_gatherv`.
    more: dict[str, Any] = {"plugins": [GPU_TOKEN_PATHS], "tokens": TOKENS, UNEVEN_PARTS_ONLY: "1"}
    with (
        network(2, bits_per_second=GIGABIT) as joined,
        serving_on(
            joined.hosts, folder / f"{name}.log", "--enforce-eager", *arguments, **more
        ) as on_hosts,
    ):
        yield joined, on_hosts


def wait_until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < end, f"{what}: not in {PATIENCE_SECONDS:g} s"
        time.sleep(0.1)


def until_experts_move(server: Server, *, plugin: bool) -> None:
    """Or for so long that they could have moved."""
    end = time.monotonic() + MIGRATION_SECONDS
    while plugin and time.monotonic() < end:
        if server.status()["migrating"]:
            return
    if plugin:
        logger.info("no experts move")
    else:
        time.sleep(MIGRATION_SECONDS / 4)


def weakened(joined: Network, asking: Clients, share: float, seconds: float) -> Outcome:
    """The link of the second host loses this share of packets for so long, and is good again."""
    began = time.monotonic()
    joined.lose(joined.hosts[1], share)
    time.sleep(seconds)
    joined.lose(joined.hosts[1], 0)
    mended = time.monotonic()

    def after() -> list[Asked]:
        return [one for one in list(asking.asked) if one.began >= mended and one.answer == "200"]

    def over() -> bool:
        try:
            asking.server.process.check_alive()
        except Exception:
            return True
        return bool(after())

    wait_until(over, "an answer, or the end")
    goes_on = bool(answered := after())
    seconds = min(one.ended for one in answered) - mended if goes_on else time.monotonic() - began
    return asking.outcome(began, mended, goes_on=goes_on, seconds=seconds)


def killed(on_hosts: OnHosts, asking: Clients) -> Outcome:
    """All processes of the second host are killed."""
    began = time.monotonic()
    for process in on_hosts.headless[0].family():
        process.kill()
    try:
        on_hosts.server.process.wait(PATIENCE_SECONDS)
        ended = True
    except subprocess.TimeoutExpired:
        ended = False
    seconds = time.monotonic() - began
    time.sleep(1)  # for the clients to see it
    return asking.outcome(began, began + seconds, goes_on=not ended, seconds=seconds)


def through_faults(folder: Path, *, plugin: bool) -> dict[str, Outcome]:
    name = f"faults-{'with' if plugin else 'without'}"
    found = {}
    with (
        served(folder, name, plugin=plugin) as (joined, on_hosts),
        clients(on_hosts.server) as asking,
    ):
        until_experts_move(on_hosts.server, plugin=plugin)
        found["loss"] = weakened(joined, asking, LOSS, LOSS_SECONDS)
        until_experts_move(on_hosts.server, plugin=plugin)
        found["stall"] = weakened(joined, asking, 1.0, STALL_SECONDS)
        until_experts_move(on_hosts.server, plugin=plugin)
        if plugin:
            logger.info("%s: plans %s", name, on_hosts.server.status()["plans"])
        found["killed"] = killed(on_hosts, asking)
    for fault, outcome in found.items():
        logger.info("%s %s: %s", name, fault, outcome)
    return found


def through_the_loss_of_a_host(folder: Path, *, plugin: bool) -> Outcome:
    name = f"vanished-{'with' if plugin else 'without'}"
    with served(folder, name, plugin=plugin) as (joined, on_hosts):
        for host in joined.hosts:
            host.run("sh", "-c", f"echo {RETRANSMISSIONS} > /proc/sys/net/ipv4/tcp_retries2")
        with clients(on_hosts.server) as asking:
            until_experts_move(on_hosts.server, plugin=plugin)
            joined.lose(joined.hosts[1], 1.0)
            found = killed(on_hosts, asking)
    logger.info("%s: %s", name, found)
    return found


@pytest.fixture(scope="module")
def without(logs: Path) -> dict[str, Outcome]:
    return through_faults(logs, plugin=False)


@pytest.fixture(scope="module")
def with_plugin(logs: Path, without: object) -> dict[str, Outcome]:
    return through_faults(logs, plugin=True)


@pytest.mark.parametrize("fault", ["loss", "stall"])
def test_a_server_outlives_a_weak_link_as_without_the_plugin(
    fault: str, without: dict[str, Outcome], with_plugin: dict[str, Outcome]
) -> None:
    for seen in (without[fault], with_plugin[fault]):
        assert seen.goes_on
        assert set(seen.answers) == {"200"}


def test_a_server_ends_with_the_processes_of_a_host_as_without_the_plugin(
    without: dict[str, Outcome], with_plugin: dict[str, Outcome]
) -> None:
    assert not without["killed"].goes_on
    assert not with_plugin["killed"].goes_on
    assert set(with_plugin["killed"].answers) == set(without["killed"].answers)


def test_a_server_ends_with_a_host_that_is_cut_off_as_without_the_plugin(logs: Path) -> None:
    without, with_plugin = (
        through_the_loss_of_a_host(logs, plugin=plugin) for plugin in (False, True)
    )
    assert not without.goes_on
    assert not with_plugin.goes_on
    assert set(with_plugin.answers) == set(without.answers)
