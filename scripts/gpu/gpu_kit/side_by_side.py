"""Several runs at once on one machine, each in a session of its own: they outlive the command that
started them, so that loads can travel meanwhile.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_kit.driver import Result
from gpu_kit.places import ROOT
from gpu_kit.report import read_log

PROCESS = "pid"
PRINTED = "summary.txt"


def start(chain: str, options: Sequence[str], out: Path) -> None:
    """Start one run. chain: its steps or groups, with commas; its folder under `out` is named so."""
    folder = out / chain
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gpu_kit", "run", *chain.split(",")]
    with (folder / PRINTED).open("ab") as printed:
        process = subprocess.Popen(
            [*command, *options, "--out", str(folder)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / PROCESS).write_text(str(process.pid))


def wait(out: Path, seconds: float) -> tuple[list[Result], list[str]]:
    """Results of all runs under `out`, in the order in which they were started, and the names of those
    that have not ended after `seconds`.
    """
    processes = sorted(out.glob(f"*/{PROCESS}"), key=lambda path: path.stat().st_mtime)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and any(map(_runs, processes)):
        time.sleep(0.5)
    logs = [path.parent / "log.jsonl" for path in processes]
    results = [result for log in logs if log.exists() for result in read_log(log)]
    return results, [path.parent.name for path in processes if _runs(path)]


def _runs(process: Path) -> bool:
    """A process that ended, and whose parent has not asked how, does not run."""
    try:
        state = Path(f"/proc/{process.read_text()}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
