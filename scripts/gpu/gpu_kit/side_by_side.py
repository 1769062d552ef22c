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
from gpu_kit.plan import chosen
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
    running = [path.parent.name for path in processes if _runs(path)]
    results = [result for path in processes for result in _results(path.parent, running)]
    return results, running


def _results(folder: Path, running: Sequence[str]) -> list[Result]:
    """Of one run; a step of a run that was killed has failed."""
    log = folder / "log.jsonl"
    results = read_log(log) if log.exists() else []
    if folder.name in running:
        return results
    told = {result.step for result in results}
    lost = [step.name for step in chosen(folder.name.split(",")) if step.name not in told]
    return results + [Result(step=name, ok=False, reason="its run was killed") for name in lost]


def _runs(process: Path) -> bool:
    """A process that ended, and whose parent has not asked how, does not run."""
    try:
        state = Path(f"/proc/{process.read_text()}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
