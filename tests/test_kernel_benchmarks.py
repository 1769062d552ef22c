"""What a GPU machine will run is ready: every case runs, and every kernel compiles for an H100."""

import json
import subprocess
import sys
from pathlib import Path

from ep_rebalance.exchanges import EXCHANGES

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    """What it printed."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_case_of_the_kernels_runs(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    run("kernels.py", "--rehearse", "--tokens", "3", "--json", str(path))
    results = json.loads(path.read_text())["results"]
    kernels = {result["kernel"] for result in results}
    routing = {"route_and_count", "route_by_own_counts", "route and group"}
    assert kernels == routing | {"grouped_mlp", "pack_experts"}
    assert all(seconds > 0 for result in results for seconds in result["seconds"].values())


def test_moves_of_quantised_experts_run_on_any_machine(tmp_path: Path) -> None:
    path = tmp_path / "moves.json"
    run("kernels.py", "--moves", "--rehearse", "--turns", "2", "--json", str(path))
    (result,) = json.loads(path.read_text())["moves"]
    small_scales = 4 * 16
    assert result["bytes"] == {
        "8 bits": 3 * 128 * 128 + 16 + 16 + small_scales,
        "bfloat16": 6 * 128 * 128,
    }
    assert min(result["ratio"]) > 0


def test_parts_of_the_self_test_are_put_together() -> None:
    printed = run("self_test.py", "--rehearse")
    for trial in ("on each rank", "between ranks"):
        (row,) = [line for line in printed.splitlines() if f"│ {trial}" in line]
        assert "exact" in row
    assert "small: 0." in printed


def test_every_candidate_of_the_all_to_all_runs(tmp_path: Path) -> None:
    path = tmp_path / "all_to_all.json"
    arguments = ("--ranks", "2", "--tokens", "3", "--hidden", "128", "--turns", "2")
    run("all_to_all.py", *arguments, "--json", str(path))
    for result in json.loads(path.read_text())["results"]:
        assert len(result["names"]) == 2 * (len(EXCHANGES) + 1)  # and vLLM's way
        assert all(min(turn) > 0 for turn in result["seconds"])


def test_no_kernel_spills_registers_at_its_tiles(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    run("kernel_resources.py", "--json", str(path))
    for kernel in json.loads(path.read_text()):
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["blocks"] >= 1, kernel
