"""What a program tells that runs with one of the releases of vLLM, for tests of what they do otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OVERLAY = Path(__file__).parents[2] / ".venv" / "engines" / "vllm-0.33"
NEEDS_033 = pytest.mark.skipif(not OVERLAY.exists(), reason="of vLLM 0.33: scripts/setup --engines")


def told_by(program: Path, release: str) -> dict[str, Any]:
    """The last line of its output, as JSON; `vllm` in it is the release that it saw.

    release: 0.32, which is installed, or 0.33, from the overlay.
    """
    paths = [
        *([str(OVERLAY)] if release == "0.33" else []),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["vllm"].startswith(release)
    return told
