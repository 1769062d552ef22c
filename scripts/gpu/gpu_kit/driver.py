"""Takes steps one after the other, each in a process group of its own and with a time limit.

A step that fails, hangs or cannot be taken is told as such, and the next one is taken.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_kit import figures
from gpu_kit.places import KIT, ROOT, STAMP
from gpu_kit.plan import Device, Step

SECONDS_TO_END = 5.0
"""Between asking a process group to end and ending it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the log. ok: None if the step was not taken; then `reason` says why."""

    step: str
    ok: bool | None
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where steps are taken.

    loads: the folder with the packed loads. site: the folder into which they are unpacked. out: the
    folder for log.jsonl, output.txt (all that steps print) and the files that steps write.
    On device cpu nothing needs to be unpacked: a rehearsal in an environment that has vLLM for CPU.
    """

    loads: Path
    site: Path
    out: Path
    device: Device = "cuda"

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    @property
    def output(self) -> Path:
        return self.out / "output.txt"

    def obstacle(self, step: Step) -> str:
        """Why a step cannot be taken here, or ""."""
        if step.needs_gpu and self.device == "cpu":
            return "needs a GPU"
        if self.device == "cpu":
            return ""
        absent = [load for load in step.loads if not (self.site / f"{load}.{STAMP}").exists()]
        return f"load {', '.join(absent)} is not unpacked" if absent else ""

    def environment(self, step: Step, told: Path) -> dict[str, str]:
        """Of a step's process: packages come from `site` first."""
        path = [str(KIT), os.environ.get("PYTHONPATH", "")]
        if self.device == "cuda":
            path.insert(0, str(self.site))
        added = {name: value.format_map(self.values()) for name, value in step.environment.items()}
        return {
            **os.environ,
            **added,
            "PYTHONPATH": os.pathsep.join(part for part in path if part),
            "PYTHONUNBUFFERED": "1",
            figures.VARIABLE: str(told),
        }

    def values(self) -> dict[str, str]:
        """What a step's command may name."""
        return {
            "root": str(ROOT),
            "loads": str(self.loads),
            "site": str(self.site),
            "out": str(self.out),
            "device": self.device,
        }


def run_steps(steps: Iterable[Step], place: Place, total_seconds: float) -> Iterator[Result]:
    """Take the steps that fit into the total, by their limits; every result is in the log when it is
    handed out.
    """
    ends = time.monotonic() + total_seconds
    place.out.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = ends - time.monotonic()
        if obstacle := place.obstacle(step):
            result = Result(step=step.name, ok=None, reason=obstacle)
        elif step.seconds > left:
            reason = f"may take {step.seconds:.0f} s, {max(left, 0):.0f} s are left"
            result = Result(step=step.name, ok=None, reason=reason)
        else:
            result = take(step, place)
        append(result, place.log)
        yield result


def append(result: Result, log: Path) -> None:
    """Add a line to a log."""
    with log.open("a") as stream:
        stream.write(json.dumps(asdict(result)) + "\n")


def take(step: Step, place: Place) -> Result:
    """One step, to its end or its limit."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, place.output.open("ab") as output:
        told = Path(folder) / "figures.json"
        output.write(f"\n===== {step.name}\n".encode())
        output.flush()
        printed_from = output.tell()
        process = subprocess.Popen(
            step.argv(place.values()),
            cwd=ROOT,
            env=place.environment(step, told),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = _end_of(process, step.seconds)
        finally:
            _kill(process.pid)
            process.wait()
        values = figures.read(told)
    reason = str(values.pop("reason", ""))
    if status is None:
        reason = f"ended at its limit of {step.seconds:.0f} s"
    elif status and not reason:
        reason = f"exit status {status}: {_last_line(place.output, printed_from)}"
    return Result(
        step=step.name,
        ok=None if status == figures.NOT_HERE else status == 0,
        seconds=round(time.monotonic() - began, 1),
        figures=values,
        reason=reason,
    )


def _end_of(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; None if the process did not end by itself in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        return None


def _kill(group: int) -> None:
    """What a step leaves behind would hold ports and GPU memory."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _last_line(output: Path, printed_from: int) -> str:
    with output.open("rb") as stream:
        stream.seek(printed_from)
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it printed nothing"
