"""SIGTERM under load, with the plugin and without: how long a server takes to be gone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from engines import GPU_TOKEN_PATHS, V032
from scene import CLIENTS, QUESTIONS, QUICK, TOKENS, spread
from serving import DATA_PARALLEL, PLUGIN, SETTINGS, Server, serving

pytestmark = [*V032.marks, pytest.mark.faults]

logger = logging.getLogger(__name__)

ENDINGS = 10
END_SECONDS = 30.0
"""A container that is not gone by then is killed, unless its runtime was told otherwise."""


@contextmanager
def under_load(server: Server) -> Iterator[None]:
    """Clients ask until the server is gone."""
    ended = threading.Event()

    def ask(client: int) -> None:
        for text in QUESTIONS[client::CLIENTS] * 50:
            if ended.is_set():
                return
            try:
                server.answer(text)
            except httpx.HTTPError:
                ended.wait(0.1)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def seconds_to_end(server: Server) -> float:
    """After a SIGTERM to its first process only, as a container's runtime sends it; END_SECONDS if it is not
    gone by then, and made to end.
    """
    family = server.process.family()
    first = min(family, key=lambda process: process.create_time())
    began = time.monotonic()
    first.terminate()
    _, alive = psutil.wait_procs(family, timeout=END_SECONDS)
    took = time.monotonic() - began
    server.process.stop()
    return END_SECONDS if alive else took


@pytest.mark.parametrize("plugin", [True, False], ids=["with the plugin", "without it"])
def test_a_server_ends_on_sigterm_under_load(plugin: bool, tmp_path: Path) -> None:
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
                log, *DATA_PARALLEL, *arguments, plugins=[GPU_TOKEN_PATHS], tokens=TOKENS, **parts
            ) as server,
            under_load(server),
        ):
            time.sleep(5.0)
            if plugin:
                while not server.status()["migrating"]:
                    time.sleep(0.05)
            spread(turn, 0.5)
            took.append(seconds_to_end(server))
            logger.info("gone after %.1f s", took[-1])
    shown = ", ".join(f"{seconds:.1f}" for seconds in sorted(took))
    logger.info("%s the plugin, gone after %s s", "with" if plugin else "without", shown)
