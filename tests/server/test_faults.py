"""What goes wrong while experts move, some of which have replicas: serving goes on, or ends as vLLM ends.
One server lives through all of it, in the order of the tests. A second one takes up what it left, moves
nothing, and splits tokens over the replicas as the load changes, through our all-to-all's other shape.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from answers import amid_a_migration, reload_amid_a_migration
from engines import FORCED_FAULTS, PREPACKED_RELOADS, V032
from saved_states import saved_generation
from serving import DATA_PARALLEL, PLUGIN, SETTINGS, Server, serving

pytestmark = V032.marks

SPLITS = 4
LITTLE_ROOM = {"all_to_all": "ours", "buffers": "fixed", "capacity_factor": 0.4}
"""Most steps take several rounds."""


@pytest.fixture(scope="module")
def state(logs: Path) -> Path:
    return logs / "state.npz"


@pytest.fixture(scope="module")
def arguments(logs: Path, state: Path) -> tuple[str, ...]:
    """A byte budget of 4 kB a step makes a migration long enough to be hit in the middle."""
    settings = {
        **SETTINGS,
        "planner": {**SETTINGS["planner"], "redundant_experts": 4},
        "migration": {"max_bytes_per_step": 4096},
        "state": {"path": str(state)},
    }
    path = logs / "slow.yaml"
    path.write_text(yaml.safe_dump(settings))
    return (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", str(path))


@pytest.fixture(scope="module")
def faulty(logs: Path, arguments: tuple[str, ...], one_rank_answers: object) -> Iterator[Server]:
    """Starts after the server of `one_rank_answers` has ended."""
    with serving(
        logs / "faulty.log",
        *arguments,
        plugins=[FORCED_FAULTS, PREPACKED_RELOADS],
        FORCED_FAULTS="planner:1,checksum:2,transport:6",
        VLLM_SERVER_DEV_MODE="1",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def restarted(logs: Path, arguments: tuple[str, ...]) -> Iterator[Server]:
    """Starts after `faulty` was killed."""
    settings = {"planner": {"policy": "none"}, "data_plane": LITTLE_ROOM}
    more = ("--ep-rebalance-config", json.dumps(settings))
    with serving(logs / "restarted.log", *arguments, *more) as server:
        yield server


def test_forced_faults_are_counted_and_serving_goes_on(
    faulty: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    status = faulty.drive_until(
        lambda s: s["plans"]["committed"] >= 2 and s["plans"]["abandoned"] >= 2
    )
    assert status["plans"]["failed"] == 1
    assert status["plans"]["abandoned"] == 2
    assert faulty.answers(questions) == one_rank_answers
    metrics, log = faulty.metrics(), faulty.log_text()
    assert 'outcome="failed"} 1.0' in metrics
    assert 'outcome="abandoned"} 2.0' in metrics
    assert "forced planner exception" in log
    assert "forced transport error" in log
    assert "1 with a checksum error" in log


def test_answers_after_a_reload_amid_a_migration_are_those_of_a_fresh_server(
    faulty: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    reload_amid_a_migration(faulty)
    assert faulty.answers(questions) == one_rank_answers


def test_a_killed_worker_ends_the_server(faulty: Server, state: Path) -> None:
    faulty.drive_until(lambda status: not status["migrating"])
    _wait_for_file(state)
    with amid_a_migration(faulty):
        family = faulty.process.family()
        worker = next(p for p in family if "Worker_DP1" in " ".join(p.cmdline()))
        worker.kill()
        _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind: {alive}"
    assert "died unexpectedly" in faulty.log_text()


def test_a_restart_warm_starts(restarted: Server, state: Path) -> None:
    # Of the last migration that was committed; a reload afterwards is not saved.
    assert restarted.status()["generation"] == saved_generation(state) > 0
    assert "took up the saved placement" in restarted.log_text()


def test_answers_are_equal_however_tokens_are_split_and_in_fixed_capacity(
    restarted: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    before, seen = restarted.status(), {quotas(restarted)}

    def another_split(_: object) -> bool:
        seen.add(quotas(restarted))
        return len(seen) > SPLITS

    assert restarted.answers(questions) == one_rank_answers
    restarted.drive_until(another_split)
    assert restarted.answers(questions) == one_rank_answers
    assert restarted.status()["generation"] == before["generation"]


def quotas(server: Server) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(layer["quotas"]) for layer in server.load()["layers"])


def _wait_for_file(path: Path) -> None:
    for _ in range(100):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")
