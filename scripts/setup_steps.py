"""What every part of the set-up does: runs commands, with a line for each long step and a log."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.stamp"
LOG = VENV / "setup.log"

CPU_TORCH = "torch==2.13.0+cpu"
NETWORK_FAILURE = re.compile(
    r"failed to (fetch|establish a new connection)|error sending request|timed out|dns error"
    r"|connection (refused|reset)|name resolution|network is unreachable",
    re.IGNORECASE,
)


class SetupError(Exception):
    """A reason to stop, with what the user can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}\n  remedy: {remedy}")


def run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    """Runs a command and returns its output; the log gets both, without passwords in URLs."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with LOG.open("a") as log:
        entry = f"$ {' '.join(map(str, command))}\n{done.stdout}\n"
        log.write(re.sub(r"://[^/@\s]+@", "://***@", entry))
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    return done.stdout


def step(
    title: str,
    command: Sequence[str | Path],
    env: dict[str, str] | None = None,
    remedy: str = "see the lines above.",
) -> str:
    """Runs one long step: its title at the start, the seconds it took at the end.

    remedy: of a failure whose cause is none of the usual ones. Raises SetupError.
    """
    print(f"{title} ... ", end="", flush=True)
    start = time.monotonic()
    try:
        output = run(command, env)
    except subprocess.CalledProcessError as failure:
        print("failed", flush=True)
        raise explain(title, failure.output, remedy) from None
    print(f"{time.monotonic() - start:.1f} s", flush=True)
    return output


def explain(title: str, output: str, remedy: str = "see the lines above.") -> SetupError:
    tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[-8:])
    if "No space left on device" in output:
        return SetupError(f"the disk is full.\n{tail}", "free some space and run this again.")
    if NETWORK_FAILURE.search(output):
        advice = "check the network, HTTPS_PROXY, and the sources that `pip config list` names"
        if "download.pytorch.org" in output:
            advice += f", or name a folder that holds the wheel of {CPU_TORCH} in PIP_FIND_LINKS"
        return SetupError(f"a package index cannot be reached.\n{tail}", f"{advice}.")
    return SetupError(f"'{title}' failed; all output is in {LOG}.\n{tail}", remedy)
