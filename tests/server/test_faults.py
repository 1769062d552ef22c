"""What goes wrong while experts move: serving goes on, or ends as vLLM ends."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from serving import DATA_PARALLEL, PLUGIN, ROOT, SETTINGS, Server, prompts_by_domain, serving

pytestmark = pytest.mark.server

FAULTS = Path(__file__).parent / "faults"


@pytest.fixture(scope="module")
def faults_on_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where vLLM finds `forced_faults`, by metadata in a folder of its own, and what it imports."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "forced_faults.py").write_bytes((FAULTS / "forced_faults.py").read_bytes())
    metadata = folder / "forced_faults-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: forced-faults\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nforced_faults = forced_faults:register\n"
    )
    path = [str(folder), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path)


def test_forced_faults_are_counted_and_serving_goes_on(
    logs: Path,
    settings_file: str,
    faults_on_path: str,
    questions: list[str],
    one_rank_answers: list[list[int]],
) -> None:
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    extra = {
        "PYTHONPATH": faults_on_path,
        "FORCED_FAULTS": "planner:1,checksum:2,transport:3",
    }
    with serving(logs / "faults.log", *arguments, **extra) as server:
        status = server.drive_until(
            lambda s: s["plans"]["committed"] >= 2 and s["plans"]["abandoned"] >= 2
        )
        assert status["plans"]["failed"] == 1
        assert status["plans"]["abandoned"] == 2
        assert server.answers(questions) == one_rank_answers
        metrics = server.metrics()
        assert 'outcome="failed"} 1.0' in metrics
        assert 'outcome="abandoned"} 2.0' in metrics
        log = server.log_text()
    assert "forced planner exception" in log
    assert "forced transport error" in log
    assert "1 with a checksum error" in log


def test_killed_worker_ends_the_server_and_a_restart_warm_starts(
    logs: Path, tmp_path: Path
) -> None:
    """A byte budget of 4 kB a step makes a migration long enough to be hit in the middle."""
    slow = {**SETTINGS, "migration": {"max_bytes_per_step": 4096}}
    state = tmp_path / "state.npz"
    settings = tmp_path / "slow.yaml"
    settings.write_text(yaml.safe_dump({**slow, "state": {"path": str(state)}}))
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", str(settings))
    with serving(logs / "killed.log", *arguments) as server:
        server.drive_until(lambda status: status["generation"] >= 1)
        _wait_for_file(state)
        saved = drive_into_migration(server)
        family = server.process.family()
        worker = next(p for p in family if "Worker_DP1" in " ".join(p.cmdline()))
        worker.kill()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, f"left behind: {alive}"
        assert "died unexpectedly" in server.log_text()
    with serving(logs / "restarted.log", *arguments) as server:
        assert server.status()["generation"] >= saved
        assert "took up the saved placement" in server.log_text()
        assert len(server.answer("import os\n")) == 64


def drive_into_migration(server: Server) -> int:
    """Returns while experts move, with the generation that was committed last."""

    def ask() -> None:
        with suppress(httpx.HTTPError):  # the server is about to be killed
            for texts in prompts_by_domain() * 4:
                server.answers(texts)

    traffic = threading.Thread(target=ask, daemon=True)
    traffic.start()
    while (status := server.status())["migrating"] == 0:
        assert traffic.is_alive(), status
    generation: int = status["generation"]
    return generation


def _wait_for_file(path: Path) -> None:
    for _ in range(100):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")
