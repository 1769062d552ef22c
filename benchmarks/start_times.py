"""How long `ep-rebalance` and each of its commands take to say what they do, and what memory that takes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ep_rebalance.commands.app import COMMANDS

COMMAND = Path(sys.executable).with_name("ep-rebalance")
PRINT_ONLY = ("config", "metrics", "hardware", "kernels", "version", "dashboards")


def started(*arguments: str) -> tuple[float, float, float]:
    """(seconds, seconds of processor time, MB at most) of one run."""
    began = time.monotonic()
    process = subprocess.Popen([str(COMMAND), *arguments], stdout=subprocess.DEVNULL)
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with code {process.returncode}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (default 5)")
    rounds = parser.parse_args().rounds
    runs = [
        ("--help",),
        *((name, "--help") for name in COMMANDS),
        *((name,) for name in PRINT_ONLY),
    ]
    for run in runs:
        started(*run)  # files come from the disk, and code from the cache, from now on
    console = Console()
    seen_RN3 = np.array(
        [
            [started(*run) for run in runs]
            for _ in track(range(rounds), "measuring", console=Console(stderr=True))
        ]
    )
    table = Table("ep-rebalance", "seconds (spread)", "of processor time", "MB")
    for run, seen_R3 in zip(runs, seen_RN3.transpose(1, 0, 2), strict=True):
        seconds, processor, memory = np.median(seen_R3, axis=0)
        spread = f"{seen_R3[:, 0].min():.2f} to {seen_R3[:, 0].max():.2f}"
        table.add_row(
            " ".join(run), f"{seconds:.2f} ({spread})", f"{processor:.2f}", f"{memory:.0f}"
        )
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
