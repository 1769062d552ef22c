"""SGLang's recordings go in, and SGLang's own code accepts the placement that comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run

from ep_rebalance.formats import sglang
from ep_rebalance.formats.format import Reading

DOWNLOAD_SECONDS = 120
RANKS, REDUNDANT = 4, 4


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    if given := os.environ.get("EP_REBALANCE_SGLANG_WHEEL"):
        return given
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "sglang", "--no-deps", "-q", "-d"]
    try:
        subprocess.run(
            [*command, str(folder)], check=True, capture_output=True, timeout=DOWNLOAD_SECONDS
        )
    except (subprocess.SubprocessError, OSError):
        pytest.skip("sglang's wheel cannot be had here; name it in EP_REBALANCE_SGLANG_WHEEL")
    (path,) = folder.glob("sglang-*.whl")
    return str(path)


def recording(folder: Path) -> Path:
    """A published one if there are any, else a skewed one with two dense layers."""
    if data := os.environ.get("EP_REBALANCE_DATA"):
        return sorted(Path(data, "deepseek-logical-counts").glob("*.json"))[0]
    counts = np.random.default_rng(0).zipf(1.6, (5, 32)).clip(max=1000) * 100
    counts[:2] = 0
    path = folder / "recording.json"
    path.write_text(json.dumps({"logical_count": counts.tolist()}))
    return path


@pytest.mark.usefixtures("compiled_planner")
def test_sglang_reads_the_placement_made_from_its_recording(wheel: str, tmp_path: Path):
    source, trace, target = recording(tmp_path), tmp_path / "load.eptrace", tmp_path / "l.json"
    assert run("convert", str(source), str(trace), "--top-k", "8", "--sample", "20").exit_code == 0
    layers, experts = np.array(json.loads(source.read_text())["logical_count"]).shape
    first = sglang.read_load(source, Reading()).moe_layers[0]
    options = ("--ep-size", str(RANKS), "--redundant", str(REDUNDANT), "--to", "sglang")
    numbers = ("--first-moe-layer", str(first), "--layers", str(layers))
    done = run("plan", str(trace), *options, *numbers, "-o", str(target))
    assert done.exit_code == 0, done.output
    script, sizes = Path(__file__).with_name("sglang_reads.py"), (experts, layers, REDUNDANT, RANKS)
    command = [sys.executable, str(script), wheel, str(target), *map(str, sizes)]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    slots_LP, replicas_LE = json.loads(read.stdout)
    assert slots_LP == json.loads(target.read_text())["physical_to_logical_map"]
    for slots, replicas in zip(slots_LP, replicas_LE, strict=True):
        assert np.bincount(slots, minlength=experts).tolist() == replicas
    assert all(slots[:experts] == list(range(experts)) for slots in slots_LP[:first])
    assert slots_LP[first][:experts] != list(range(experts))
