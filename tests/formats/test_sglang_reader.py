"""SGLang's own code accepts the placements that are written for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import run
from traces import head_of, write_trace

from ep_rebalance.config import load_config
from ep_rebalance.placement import Placement
from ep_rebalance.state import (
    FORMAT,
    FORMAT_VERSION,
    Header,
    ModelIdentity,
    SavedState,
    read_state,
    save_state,
)

DOWNLOAD_SECONDS = 120
DENSE, MOE, EXPERTS, RANKS, REDUNDANT = 2, 3, 32, 4, 4


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


def planned_placement(folder: Path) -> Path:
    """A state file with the placement that a replay of generated load ends with."""
    from ep_rebalance.commands.replay import open_traces, scenario
    from ep_rebalance.replay.run import replay

    head = head_of(
        layers=MOE, experts=EXPERTS, ranks=RANKS, redundant=REDUNDANT, origin="generated"
    )
    readers = open_traces([write_trace(folder, head, 30)])
    one = scenario(head, load_config(head.config), "ours", RANKS, REDUNDANT)
    placement = replay(head, readers[0], one).commits[-1].placement
    assert isinstance(placement, Placement)
    identity = ModelIdentity(
        model="m", config_hash="h", experts=EXPERTS, ep_size=RANKS, redundant_experts=REDUNDANT
    )
    header = Header(
        format=FORMAT,
        version=FORMAT_VERSION,
        identity=identity,
        generation=1,
        saved_at=0.0,
        plugin_version="0.1.0",
    )
    state = SavedState(
        header=header,
        placement=placement,
        quotas_LP=placement.even_quotas_LP(),
        load_LE=placement.replica_counts_LE().astype(float),
    )
    save_state(folder / "state.npz", state)
    return folder / "state.npz"


@pytest.mark.usefixtures("compiled_planner")
def test_sglang_reads_the_expert_location(wheel: str, tmp_path: Path):
    state, target = planned_placement(tmp_path), tmp_path / "location.json"
    options = ("--to", "sglang", "--first-moe-layer", str(DENSE), "--layers", str(DENSE + MOE))
    assert run("convert", str(state), str(target), *options).exit_code == 0
    sizes = map(str, (EXPERTS, DENSE + MOE, REDUNDANT, RANKS))
    script = Path(__file__).with_name("sglang_reads.py")
    done = subprocess.run(
        [sys.executable, str(script), wheel, str(target), *sizes],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    slots_LP, replicas_LE = json.loads(done.stdout)
    placement = read_state(state).placement
    assert slots_LP[DENSE:] == placement.slots_LP.tolist()
    assert replicas_LE[DENSE:] == placement.replica_counts_LE().tolist()
    assert all(slots[:EXPERTS] == list(range(EXPERTS)) for slots in slots_LP[:DENSE])
