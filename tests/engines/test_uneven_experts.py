"""Experts that do not divide by the ranks lie where vLLM puts them, in each release."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ep_rebalance.placement import Placement

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / ".venv" / "engines" / "vllm-0.33"


@pytest.mark.parametrize(
    ("release", "path"),
    [
        pytest.param("0.32", [], id="0.32"),
        pytest.param(
            "0.33",
            [str(OVERLAY)],
            id="0.33",
            marks=pytest.mark.skipif(
                not OVERLAY.exists(), reason="of vLLM 0.33: scripts/setup --engines"
            ),
        ),
    ],
)
def test_each_slot_is_on_the_rank_that_holds_it(release, path):
    paths = [*path, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_expert_maps.py"))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["vllm"].startswith(release)
    for found in told["maps"]:
        experts, ranks = found["experts"], found["ranks"]
        sizes = {"num_layers": 1, "num_experts": experts, "num_ranks": ranks}
        linear, dealt = Placement.contiguous(**sizes), Placement.round_robin(**sizes)
        assert by_rank(linear) == found["linear"], found
        if experts >= ranks:
            assert by_rank(dealt) == found["round_robin"], found
            assert np.argsort(dealt.slots_LP[0]).tolist() == found["dealt_slots"]


def by_rank(placement: Placement) -> list[list[int]]:
    """The experts of each rank, in the order of their slots."""
    rank_P = placement.rank_of(np.arange(placement.num_slots))
    return [placement.slots_LP[0, rank_P == rank].tolist() for rank in range(placement.num_ranks)]
