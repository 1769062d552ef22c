"""Disks that are full, small or busy, and processes that are killed, for tests. All of it is real."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = ("", "tests/support", "tests/balancer")


@contextlib.contextmanager
def room_for(path: Path, more: int) -> Iterator[None]:
    """No file may grow beyond what `path` has and `more` bytes: a write ends there, as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def hanging_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """The folder is a file system of its own; what is yielded lets it hang ("--freeze") or go on
    ("--unfreeze"), as fsfreeze calls it. For root.
    """
    image = folder.with_name(f"{folder.name}.img")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield lambda what: subprocess.run(["fsfreeze", what, str(folder)], check=True) and None
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(folder)], capture_output=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        image.unlink()


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def run(
    program: str, *arguments: object, inside: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A Python process that has ended.

    inside: the command that starts it.
    """
    command = [*inside, *_command(program, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=_environment())


def _command(program: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-P", "-c", program, *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(str(ROOT / part) for part in PATHS)}


@contextlib.contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has said "ready"; killed at the end."""
    process = subprocess.Popen(
        _command(program, arguments), stdout=subprocess.PIPE, text=True, env=_environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
