"""What happens to the files that a server reads and writes, while it does so."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disks import fill, hanging_disk
from fault import fault
from saved_states import saved_generation
from scene import MOMENT_SECONDS, Scene, assert_readable

SMALL = "64k"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """The folder is a file system that is full."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "small", str(folder)], check=True
    )
    fill(folder / "filler")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _commits(scene: Scene, number: int = 1) -> None:
    committed = scene.server.status()["plans"]["committed"]
    scene.wait_until(lambda s: s["plans"]["committed"] >= committed + number)


@fault(
    "the disk of the state is full for two migrations",
    "seen in the status; saved when there is room",
)
def state_disk_full(scene: Scene, seed: int) -> str:
    _commits(scene)
    with scene.fault("disk full"), small_disk(scene.state.parent):
        _commits(scene, 2)
        assert not scene.state.exists()
    _commits(scene)
    _until_saved(scene)
    return f"saved again at generation {saved_generation(scene.state)}"


@fault(
    "the disk of the state hangs until a save is overdue",
    "no step waits for it; seen in the status; saved when it goes on",
)
def state_disk_hangs(scene: Scene, seed: int) -> str:
    _commits(scene)
    scene.state.parent.mkdir(exist_ok=True)
    with scene.fault("disk hangs"), hanging_disk(scene.state.parent) as fsfreeze:
        fsfreeze("--freeze")
        seen = scene.wait_until(lambda s: s["file_faults"]["state"] != "", 2 * MOMENT_SECONDS)
        scene.serves_on()
        _commits(scene)
        fsfreeze("--unfreeze")
        _until_saved(scene)
        scene.wait_until(lambda s: s["file_faults"]["state"] == "")
    _commits(scene)
    _until_saved(scene)
    return f"told: {seen['file_faults']['state']}; saved again"


@fault("the state's folder is taken away for two migrations", "saved when it is there again")
def state_folder_gone(scene: Scene, seed: int) -> str:
    _commits(scene)
    away = scene.state.parent.with_name("away")
    with scene.fault("no folder"):
        scene.state.parent.rename(away)
        _commits(scene, 2)
        away.rename(scene.state.parent)
    _commits(scene)
    _until_saved(scene)
    return f"saved again at generation {saved_generation(scene.state)}"


@fault(
    "the state is garbage when a server starts",
    "refused at start, with the file's name and the remedy",
)
def state_garbage(scene: Scene, seed: int) -> str:
    _commits(scene)
    _until_saved(scene)
    scene.end()
    whole = scene.state.read_bytes()
    scene.state.write_bytes(whole[: len(whole) // 2])
    told = scene.refused()
    assert str(scene.state) in told, told[-2000:]
    scene.state.write_bytes(whole)
    said = [line for line in told.splitlines() if str(scene.state) in line]
    return said[-1].split("Error: ")[-1].replace(str(scene.state.parent.parent), "")[:160]


@fault(
    "the traces are deleted while they are written", "noticed; a new one is begun; serving goes on"
)
def traces_deleted(scene: Scene, seed: int) -> str:
    with scene.fault("traces deleted"):
        for path in scene.traces.iterdir():
            path.unlink()
        scene.wait_until(lambda _: any(scene.traces.glob("*.eptrace")))
    scene.serves_on()
    return f"begun anew: {', '.join(p.name for p in scene.traces.glob('*.eptrace'))}"


@fault("a file of another kind lies in the trace folder", "ignored; recording goes on")
def foreign_trace(scene: Scene, seed: int) -> str:
    (scene.traces / "load-old.eptrace").write_bytes(b"not a trace")
    try:
        scene.end()
        before = set(scene.traces.iterdir())
        _commits(scene)
        new = set(scene.traces.iterdir()) - before
        assert new, "nothing new is recorded"
    finally:
        (scene.traces / "load-old.eptrace").unlink()
    return f"recorded beside it: {', '.join(sorted(p.name for p in new))}"


@fault(
    "the disk of the traces is full for a minute",
    "what is lost is counted; later records can be read",
)
def trace_disk_full(scene: Scene, seed: int) -> str:
    scene.end()
    kept = scene.traces.rename(scene.traces.with_name("kept-traces"))
    with small_disk(scene.traces):
        _commits(scene, 2)
        time.sleep(20)
        (scene.traces / "filler").unlink()
        _commits(scene)
        seen = scene.wait_until(lambda s: s["file_faults"]["trace"] == "")
        assert_readable(scene)
        assert seen["lost_trace_records"] > 0
        scene.end()
    scene.traces.rmdir()
    kept.rename(scene.traces)
    return f"{seen['lost_trace_records']} records lost, later ones read"


@fault(
    "two servers with one state file and one trace folder",
    "the second is refused; the first serves on",
)
def two_servers(scene: Scene, seed: int) -> str:
    assert scene.server
    with scene.fault("second server"):
        told = scene.refused()
    assert str(scene.folder) in told
    scene.serves_on()
    said = [line for line in told.splitlines() if "Error" in line and str(scene.folder) in line]
    return said[-1].split("Error: ")[-1].replace(str(scene.folder), "")[:160] if said else "refused"


def _until_saved(scene: Scene) -> None:
    generation = scene.server.status()["generation"]
    scene.wait_until(lambda _: saved_generation(scene.state) >= generation)
