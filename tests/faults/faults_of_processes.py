"""Signals: processes killed before, during and after a commit, stopped for long, asked to end."""

from __future__ import annotations

import signal
import time

from fault import BOTH, FAULTS, Fault, fault
from saved_states import saved_generation
from scene import (
    DATA_PARALLEL,
    TENSOR_PARALLEL,
    Layout,
    Scene,
    assert_readable,
    spread,
    stopped,
)

MOMENTS = ("before", "during", "after")
STOP_SECONDS = 45.0
LOOP = 20
ENDS = "the server ends, no process is left, the state can be read"
ENDS_WITH_ITS_CONTAINER = (
    "vLLM leaves engines and workers behind, with the plugin or without; when the container is gone, the "
    "state can be read"
)
STANDS_STILL = (
    "nobody wakes an engine that has nothing to do, so that requests may wait for ever, with the plugin or "
    "without; the server ends when it is asked to, no process is left, the state can be read"
)
LATER_SECONDS = 5.0
PROMISES = {"vllm serve": ENDS_WITH_ITS_CONTAINER, "DPCoordinator": STANDS_STILL}
ENDS_WHEN_ASKED = (
    "the server ends when its clients have hung up, no process is left, the state can be read"
)
GOES_ON = "the server waits, and goes on"


def _killing(name: str, moment: str) -> None:
    def kill(scene: Scene, seed: int) -> str:
        scene.until(moment)
        victim = scene.process(name)
        with scene.fault(f"{name} killed", refuses=True):
            spread(seed, 0.3)
            family = scene.server.process.family()
            victim.kill()
            if promise != ENDS:
                time.sleep(LATER_SECONDS)
            if promise == ENDS_WITH_ITS_CONTAINER:
                for left in family - {victim}:
                    left.kill()
            elif promise == STANDS_STILL:
                scene.process("vllm serve").terminate()
            took = scene.ended(hang_up=promise == STANDS_STILL)
        assert_readable(scene)
        return f"gone after {took:.1f} s"

    promise = PROMISES.get(name, ENDS)
    layout = DATA_PARALLEL if name in DATA_PARALLEL.processes else TENSOR_PARALLEL
    when = {
        "before": "while no experts move",
        "during": "amid a migration",
        "after": "after a commit",
    }
    FAULTS.append(Fault(f"SIGKILL of {name}, {when[moment]}", promise, layout, kill, 90.0))


for process in (*DATA_PARALLEL.processes, *(p for p in TENSOR_PARALLEL.processes if "TP" in p)):
    for at in MOMENTS:
        _killing(process, at)


def _stopping(name: str, layout: Layout) -> None:
    def stop(scene: Scene, seed: int) -> str:
        scene.until("during")
        with scene.fault(f"{name} stopped"):
            spread(seed, 0.3)
            with stopped(scene.process(name)):
                time.sleep(STOP_SECONDS)
            began = time.monotonic()
            scene.serves_on()
        return f"goes on {time.monotonic() - began:.1f} s after it may"

    what = f"SIGSTOP of {name} for {STOP_SECONDS:g} s, amid a migration"
    FAULTS.append(Fault(what, GOES_ON, layout, stop, 150.0))


for of in (DATA_PARALLEL, TENSOR_PARALLEL):
    for process in of.processes:
        if "Worker" in process:
            _stopping(process, of)


@fault("SIGTERM of the server amid a migration, under load", ENDS_WHEN_ASKED, layouts=BOTH)
def terminated(scene: Scene, seed: int) -> str:
    scene.until("during")
    with scene.fault("SIGTERM", refuses=True):
        spread(seed, 0.3)
        scene.process("vllm serve").terminate()
        took = scene.ended(hang_up=True)
    assert_readable(scene)
    return f"gone after {took:.1f} s"


@fault("SIGINT of the whole process group, as from a terminal", ENDS_WHEN_ASKED)
def interrupted(scene: Scene, seed: int) -> str:
    scene.until("during")
    with scene.fault("SIGINT", refuses=True):
        spread(seed, 0.3)
        scene.server.process.send_signal(signal.SIGINT)
        took = scene.ended(hang_up=True)
    assert_readable(scene)
    return f"gone after {took:.1f} s"


@fault(f"{LOOP} crashes, each followed by a start", "every start takes up what was saved last")
def crash_loop(scene: Scene, seed: int) -> str:
    saved = []
    for turn in range(LOOP):
        scene.wait_until(lambda status: status["plans"]["committed"] >= 1)
        with scene.fault("crash", refuses=True):
            spread(seed + turn, 1.0)
            for process in scene.server.process.family():
                process.kill()
            scene.ended()
        saved.append(saved_generation(scene.state))
        assert_readable(scene)
        began = scene.server.status()["generation"]
        assert began >= saved[-1], f"began with generation {began}, {saved[-1]} was saved"
    assert saved == sorted(saved)
    return f"generation {saved[0]} to {saved[-1]}, never an older one"
