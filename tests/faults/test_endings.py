"""SIGTERM under load, with the plugin and without: how long a server takes to be gone."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from client import Client
from engines import GPU_TOKEN_PATHS, V032
from scene import CLIENTS, QUESTIONS, QUICK, TOKENS, spread
from serving import DATA_PARALLEL, PLUGIN, SETTINGS, Server, serving

pytestmark = [*V032.marks, pytest.mark.faults]

ENDINGS = int(os.environ.get("ENDINGS", "10"))
"""Of each kind, one minute and more each."""
GRACE = ("--shutdown-timeout", "20")
"""In which vLLM answers what it has been asked; without it, it kills its engines at once."""
END_SECONDS = 30.0
"""A container that is not gone by then is killed, unless its runtime was told otherwise."""


@contextmanager
def under_load(server: Server) -> Iterator[Client]:
    """Clients ask until this is left."""
    ended, client = threading.Event(), Client()

    def ask(first: int) -> None:
        for text in itertools.cycle(QUESTIONS[first::CLIENTS]):
            if ended.is_set():
                return
            if client.post(server.url, "/v1/completions", server.body(text))[0] != 200:
                ended.wait(0.1)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield client
    finally:
        ended.set()
        client.hang_up()
        for thread in threads:
            thread.join()


def seconds_to_end(server: Server, client: Client) -> float:
    """After a SIGTERM to its first process only, as a container's runtime sends it. Clients hang up after
    END_SECONDS, and then it must end, too.
    """
    family = server.process.family()
    first = min(family, key=lambda process: process.create_time())
    began = time.monotonic()
    first.terminate()
    _, alive = psutil.wait_procs(family, timeout=END_SECONDS)
    if alive:
        while alive and time.monotonic() < began + 2 * END_SECONDS:
            client.hang_up()
            _, alive = psutil.wait_procs(alive, timeout=1.0)
    assert not alive, f"{len(alive)} processes are left though nobody waits for them"
    return time.monotonic() - began


@pytest.mark.parametrize("grace", [(), GRACE], ids=["at once", "with grace"])
@pytest.mark.parametrize("plugin", [True, False], ids=["with the plugin", "without it"])
def test_a_server_ends_on_sigterm_under_load(
    plugin: bool, grace: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the plugin each rank has a part of every expert: vLLM on CPU has no expert parallelism."""
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | QUICK))
    arguments = (*PLUGIN, "--ep-rebalance-config", str(file)) if plugin else ("--enforce-eager",)
    # vLLM on CPU has no `all_gatherv`.
    parts = {} if plugin else {"GPU_TOKEN_PATHS_UNEVEN_PARTS_ONLY": "1"}
    took = []
    for turn in range(ENDINGS):
        log = tmp_path / f"ending-{turn}.log"
        with (
            serving(
                log,
                *(*DATA_PARALLEL, *arguments, *grace),
                plugins=[GPU_TOKEN_PATHS],
                tokens=TOKENS,
                **parts,
            ) as server,
            under_load(server) as client,
        ):
            time.sleep(5.0)
            if plugin:
                while not server.status()["migrating"]:
                    time.sleep(0.05)
            spread(turn, 0.5)
            took.append(seconds_to_end(server, client))
    shown = ", ".join(f"{seconds:.1f}" for seconds in sorted(took))
    words = ("with" if plugin else "without", "the plugin", *grace)
    with capsys.disabled():
        sys.stdout.write(f"\n{' '.join(words)}: gone after {shown} s\n")
    assert not grace or max(took) < END_SECONDS, "it waited for its clients all the same"
