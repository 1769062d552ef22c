"""Machines that give a server little: few descriptors, a small /dev/shm, a home that cannot be written."""

from __future__ import annotations

from collections.abc import Sequence

from fault import fault
from scene import Scene

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


@fault("a /dev/shm of 64 MB, as containers have it", RUNS)
def small_shared_memory(scene: Scene, seed: int) -> str:
    return _restarted_below(scene, _mounted("mount -t tmpfs -o size=64m small /dev/shm"))


@fault("a home that can only be read", RUNS)
def home_read_only(scene: Scene, seed: int) -> str:
    return _restarted_below(scene, _mounted('mount -o bind,ro "$HOME" "$HOME"'))


def _mounted(command: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-c", f'{command} && exec "$@"', "sh")
