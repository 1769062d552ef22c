"""What fails within: the planner, a transfer, a reload of weights amid a migration."""

from __future__ import annotations

from fault import BOTH, fault
from scene import Scene, spread

COUNTED = "counted, serving goes on"
MOST_RELOADS = 20
"""Some migrations end before a reload begins."""


def _counted(scene: Scene, demand: str, outcome: str) -> str:
    before = scene.server.status()["plans"][outcome]
    with scene.fault(demand):
        scene.demand(demand)
        after = scene.wait_until(lambda s: s["plans"][outcome] > before)["plans"][outcome]
        scene.wait_until(lambda s: bool(s["migrating"]))
    scene.serves_on()
    return f"{outcome}: {before} before, {after} after; experts move again"


@fault("the planner raises MemoryError", COUNTED, layouts=BOTH)
def planner_raises(scene: Scene, seed: int) -> str:
    return _counted(scene, "planner-raises", "failed")


@fault("the planner raises SystemExit", COUNTED, layouts=BOTH)
def planner_exits(scene: Scene, seed: int) -> str:
    return _counted(scene, "planner-exits", "failed")


@fault("the planner hangs for 20 s", "no step waits for it")
def planner_hangs(scene: Scene, seed: int) -> str:
    with scene.fault("planner hangs"):
        scene.demand("planner-hangs")
        scene.serves_on(15.0)
    scene.until("during")
    return "answers meanwhile; experts move again"


@fault("a plan with quotas that are not numbers", "refused, counted, serving goes on")
def plan_not_finite(scene: Scene, seed: int) -> str:
    return _counted(scene, "plan-not-finite", "failed")


@fault("a byte of an expert flips on its way", "nothing is committed, counted", layouts=BOTH)
def byte_flipped(scene: Scene, seed: int) -> str:
    return _counted(scene, "byte-flipped", "abandoned")


@fault("one rank cannot pack an expert", "all ranks abandon the migration, counted", layouts=BOTH)
def packing_fails(scene: Scene, seed: int) -> str:
    return _counted(scene, "packing-fails", "abandoned")


def _reloaded(scene: Scene, seed: int) -> int:
    """How many migrations were abandoned."""
    before = scene.until("during")
    with scene.fault("reload"):
        spread(seed, 0.2)
        scene.server.call_workers("reload_weights")
    scene.wait_until(lambda s: s["weight_reloads"] > before["weight_reloads"])
    scene.serves_on()
    # Only now: the migration is given up after the reload was counted.
    after = scene.server.status()["plans"]["abandoned"]
    abandoned: int = after - before["plans"]["abandoned"]
    return abandoned


@fault(
    "weights reloaded amid a migration", "abandoned on all ranks; answers are right", layouts=BOTH
)
def reloaded(scene: Scene, seed: int) -> str:
    for tries in range(1, MOST_RELOADS + 1):
        if abandoned := _reloaded(scene, seed + tries):
            return f"{abandoned} migration(s) abandoned; reloads until one met a migration: {tries}"
    raise AssertionError(f"none of {MOST_RELOADS} reloads met a migration")


@fault("weights reloaded ten times in a row", "answers are right", layouts=BOTH)
def reload_storm(scene: Scene, seed: int) -> str:
    before = scene.server.status()["weight_reloads"]
    with scene.fault("reloads"):
        for turn in range(10):
            spread(seed + turn, 0.5)
            scene.server.call_workers("reload_weights")
    after = scene.wait_until(lambda s: s["weight_reloads"] >= before + 10)["weight_reloads"]
    scene.until("during")
    return f"{after - before} reloads; experts move again"
