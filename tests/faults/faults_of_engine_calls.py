"""What an RL trainer tells the engine while experts move: weights updated, generation paused and resumed."""

from __future__ import annotations

from typing import Any

import httpx
from fault import BOTH, fault
from scene import Scene, spread
from serving import OPERATOR, TINY_MOE

UPDATES = 5
PAUSES = 20


def _tell(scene: Scene, route: str, body: dict[str, Any] | None = None, **query: str) -> None:
    """One of vLLM's own routes for RL."""
    answer = httpx.post(
        f"{scene.server.url}/{route}",
        json=body or {},
        params=query,
        headers={"authorization": f"Bearer {OPERATOR}"},
        timeout=60,
    )
    assert answer.status_code == httpx.codes.OK, answer.text


def _update(scene: Scene) -> None:
    """Requests wait meanwhile: while vLLM loads a layer its weights are nowhere."""
    file = {"path": str(TINY_MOE / "model.safetensors")}
    _tell(scene, "pause", mode="keep")
    _tell(scene, "start_weight_update")
    _tell(scene, "update_weights", {"update_info": file})
    _tell(scene, "finish_weight_update")
    _tell(scene, "resume")


@fault(
    f"weights updated {UPDATES} times as in RL training, amid migrations",
    "answers are those of the new weights; experts move again",
    layouts=BOTH,
)
def updated(scene: Scene, seed: int) -> str:
    before = scene.server.status()
    with scene.fault("weight updates"):
        for turn in range(UPDATES):
            scene.until("during")
            spread(seed + turn, 0.3)
            _update(scene)
    after = scene.wait_until(lambda s: s["weight_reloads"] >= before["weight_reloads"] + UPDATES)
    scene.until("during")
    scene.serves_on()
    abandoned = after["plans"]["abandoned"] - before["plans"]["abandoned"]
    return f"{UPDATES} updates, {abandoned} migration(s) abandoned; experts move again"


@fault(
    f"generation paused and resumed {PAUSES} times amid migrations",
    "requests wait and go on; experts move again",
)
def paused(scene: Scene, seed: int) -> str:
    with scene.fault("pauses"):
        for turn in range(PAUSES):
            scene.until("during")
            _tell(scene, "pause", mode="keep")
            spread(seed + turn, 0.3)
            _tell(scene, "resume")
    scene.serves_on()
    scene.until("during")
    return f"{PAUSES} pauses; experts move again"
