"""Machines that give a server little, or what is wrong: few descriptors, no memory, a false clock."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault import fault
from scene import Scene, assert_readable

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
RUNS = "serves and moves experts, or says at start what it lacks"


def _restarted_below(scene: Scene, enter: Sequence[str], **extra: str) -> str:
    """What the server does that runs below this command."""
    scene.end()
    scene.start(enter=enter, **extra)
    scene.wait_until(lambda status: status["plans"]["committed"] >= 1)
    scene.serves_on()
    scene.end()
    return "serves, and experts move"


@fault("256 file descriptors for each process", RUNS)
def few_descriptors(scene: Scene, seed: int) -> str:
    return _restarted_below(scene, ("prlimit", "--nofile=256:256"))


@fault("a /dev/shm of 64 MB, as containers have it", "vLLM needs more, and says so at start")
def small_shared_memory(scene: Scene, seed: int) -> str:
    scene.end()
    told = scene.refused(enter=_mounted("mount -t tmpfs -o size=64m small /dev/shm"))
    said = [line for line in told.splitlines() if "/dev/shm" in line and "Error" in line]
    assert said, told[-2000:]
    return said[-1].split("Error: ")[-1]


@fault("a home that can only be read", RUNS)
def home_read_only(scene: Scene, seed: int) -> str:
    return _restarted_below(scene, _mounted('mount -o bind,ro "$HOME" "$HOME"'))


@fault(
    "the container has no memory left, and the kernel kills what takes most",
    "the server ends, no process is left, the state can be read",
)
def out_of_memory(scene: Scene, seed: int) -> str:
    with _memory_group() as group:
        scene.end()
        scene.start(enter=("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"))
        scene.until("during")
        used = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(used + (64 << 20)))
        with scene.fault("out of memory", refuses=True):
            neighbour = _eats_memory(group)
            try:
                took = scene.ended()
            finally:
                neighbour.kill()
                neighbour.wait()
    assert_readable(scene)
    return f"gone after {took:.1f} s"


@contextmanager
def _memory_group() -> Iterator[Path]:
    """A cgroup whose memory can be limited."""
    group = Path("/sys/fs/cgroup/memory/ep_rebalance_faults")
    if not group.parent.exists():
        pytest.skip("there is no memory controller of cgroups, version 1")
    group.mkdir(exist_ok=True)
    try:
        yield group
    finally:
        group.rmdir()


def _eats_memory(group: Path) -> subprocess.Popen[bytes]:
    """A process in the group that takes what there is, and that the kernel spares."""
    program = (
        "import os; open('/proc/self/oom_score_adj', 'w').write('-1000')\n"
        f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "taken = [os.urandom(1 << 20) for _ in range(256)]\n"
        "import time; time.sleep(600)"
    )
    return subprocess.Popen([sys.executable, "-c", program])


@fault(
    "the clock goes back a day, and a year ahead",
    "serving goes on, experts move, traces and state can be read in their order",
)
def wrong_clock(scene: Scene, seed: int) -> str:
    if not FAKETIME.exists():
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    clock = scene.folder / "clock"
    clock.write_text("+0")
    scene.end()
    scene.start(
        LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_CACHE_DURATION="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    with scene.fault("wrong clock"):
        for off in ("-1d", "+1y", "+0"):
            clock.write_text(off)
            time.sleep(2)
            scene.until("after")
            scene.serves_on()
    scene.end()
    assert_readable(scene)
    return "serves, and experts move, at all three times"


def _mounted(command: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-c", f'{command} && exec "$@"', "sh")
