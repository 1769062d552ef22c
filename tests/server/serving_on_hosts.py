"""One server on several hosts, by vLLM's own data parallelism over nodes: an API server on the first host,
the others headless.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpu_server import NotServing, ServerProcess
from engines import V032
from hosts import Host
from serving import STARTS, TOKENS, Server, Start, complete, environment

PORT = 8000
RPC_PORT = 13_345


@dataclass(frozen=True)
class OnHosts:
    """server: that of the first host. headless, logs: of the others."""

    server: Server
    headless: tuple[ServerProcess, ...]
    logs: tuple[Path, ...]


@contextmanager
def serving_on(
    hosts: Sequence[Host],
    log: Path,
    *arguments: str,
    ranks: Sequence[int] = (1, 1),
    elsewhere: Sequence[str] | None = None,
    plugins: Sequence[Path] = (),
    tokens: int = TOKENS,
    **extra: str,
) -> Iterator[OnHosts]:
    """A server that has answered /health; ended with all its processes.

    ranks: how many of them are on each host.
    elsewhere: the arguments of the other hosts, if they are others.
    extra: environment variables.
    """
    began = time.monotonic()
    processes, logs = start_on(
        hosts, log, *arguments, ranks=ranks, elsewhere=elsewhere, plugins=plugins, **extra
    )
    first, *others = processes
    server = Server(first, PORT, log, tokens, address=hosts[0].address)
    try:
        asyncio.run(
            first.ready(
                server.url, tell=lambda _: [other.check_alive() for other in others] and None
            )
        )
        STARTS.append(Start(log.stem, V032, time.monotonic() - began))
        yield OnHosts(server, tuple(others), tuple(logs[1:]))
    except NotServing as error:
        told = "\n".join(f"{path}:\n{path.read_text(errors='replace')[-6000:]}" for path in logs)
        raise AssertionError(f"the server {error}:\n{told}") from None
    finally:
        server.close()
        for process in processes:
            process.stop()


def start_on(
    hosts: Sequence[Host],
    log: Path,
    *arguments: str,
    ranks: Sequence[int] = (1, 1),
    elsewhere: Sequence[str] | None = None,
    plugins: Sequence[Path] = (),
    **extra: str,
) -> tuple[list[ServerProcess], list[Path]]:
    """The processes of each host, as they start, and their logs. See `serving_on`."""
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    processes, logs = [], []
    for host, count, before in zip(
        hosts, ranks, itertools.accumulate(ranks, initial=0), strict=False
    ):
        own = [
            *(arguments if not before or elsewhere is None else elsewhere),
            *_node(hosts[0], host),
        ]
        own += ["--data-parallel-size", str(sum(ranks)), "--data-parallel-size-local", str(count)]
        if before:
            own += [
                "--headless",
                "--api-server-count",
                "0",
                "--data-parallel-start-rank",
                str(before),
            ]
        variables = environment(count, V032.environment(plugins) | host.environment | extra)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(next(cores)) for _ in range(count))
        logs.append(log.with_stem(f"{log.stem}-{host.name}") if before else log)
        processes.append(ServerProcess(complete(PORT, *own), variables, logs[-1], enter=host.enter))
    return processes, logs


def _node(first: Host, host: Host) -> list[str]:
    return [
        "--host", host.address,
        "--data-parallel-address", first.address,
        "--data-parallel-rpc-port", str(RPC_PORT),
    ]  # fmt: skip
