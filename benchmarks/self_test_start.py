"""Starts of real servers with the self-test and without, by turns."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from cpu_server import HOST, START_SECONDS, ServerProcess, cpu_environment, free_port

MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe"
RANKS = 2
LOOK_SECONDS = 0.1
"""Between two looks at whether it serves."""


@dataclass(frozen=True, slots=True)
class Started:
    """seconds: from the process's start until it serves. tried: of these, what the plugin says that finding,
    comparing and trying took on rank 0. layers: that were tried.
    """

    seconds: float
    tried: float
    layers: int


def start(folder: Path, port: int, *, self_test: bool) -> Started:
    """One server, ended again. Raises NotServing if it does not come up."""
    free_port(port)
    config = json.dumps({"mode": "rebalance", "quantisation": {"self_test": self_test}})
    arguments = [
        *(str(MODEL), "--host", HOST, "--port", str(port), "--api-server-count", "1"),
        *("--data-parallel-size", str(RANKS), "--enable-expert-parallel", "--enforce-eager"),
        *("--max-model-len", "640", "--plugin", "ep_rebalance", "--ep-rebalance-config", config),
    ]
    environment = {**os.environ, **cpu_environment(RANKS)}
    began = time.monotonic()
    process = ServerProcess(arguments, environment, folder / f"self_test_{self_test}.log")
    try:
        _wait(process, port)
        seconds = time.monotonic() - began
        status = _status(port)
    finally:
        process.stop()
    return Started(seconds, status["self_test_seconds"], sum(status["self_test"].values()))


def _wait(process: ServerProcess, port: int) -> None:
    ends = time.monotonic() + START_SECONDS
    with httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False) as client:
        while time.monotonic() < ends:
            process.check_alive()
            with suppress(httpx.TransportError):
                if client.get("/health").is_success:
                    return
            time.sleep(LOOK_SECONDS)
    raise TimeoutError(f"no server within {START_SECONDS:.0f} s")


def _status(port: int) -> dict[str, Any]:
    url = f"http://{HOST}:{port}/ep_rebalance/status"
    answer = httpx.get(url, timeout=60, trust_env=False)
    answer.raise_for_status()
    return dict(answer.json())


def print_starts(pairs: int, port: int, console: Console) -> None:
    """Pairs of starts, the order changing from pair to pair, after one start that is not counted."""
    folder = Path(tempfile.mkdtemp(prefix="ep-rebalance-self-test-"))
    console.print(f"logs in {folder}", highlight=False)
    start(folder, port, self_test=True)
    started: dict[bool, list[Started]] = {True: [], False: []}
    for number in track(range(pairs), "pairs of starts", console=console):
        for self_test in (True, False) if number % 2 else (False, True):
            one = start(folder, port, self_test=self_test)
            started[self_test].append(one)
            console.print(f"self-test {'on' if self_test else 'off'}: {one.seconds:.1f} s")
    table = Table(title=f"starts of {MODEL.name} on {RANKS} data-parallel ranks, seconds")
    for heading in ("self-test", "start, median (range)", "of these the plugin", "layers tried"):
        table.add_column(heading, justify="right")
    for self_test, of_kind in started.items():
        table.add_row(
            "on" if self_test else "off",
            _spread([one.seconds for one in of_kind], 1),
            _spread([one.tried for one in of_kind], 3),
            str(of_kind[0].layers),
        )
    console.print(table)
    ratios = [
        tried.seconds / untried.seconds
        for tried, untried in zip(started[True], started[False], strict=True)
    ]
    console.print(
        f"start with the self-test to start without, same pair: {_spread(ratios, 3)}, {pairs} pairs",
        highlight=False,
    )


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
