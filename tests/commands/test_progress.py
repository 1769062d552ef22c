"""Progress bars end with the command, also with one that fails halfway."""

import gc
import json
import threading
import time
from pathlib import Path

from command_line import run

SECONDS = 5.0


def drawing() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if type(one).__module__.startswith("rich.")]


def test_a_conversion_that_fails_leaves_no_thread_that_draws(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"logical_count": [[[5, 3]], [[2**33, 1]]]}))
    gc.disable()
    try:
        done = run("convert", str(path), str(tmp_path / "out.eptrace"), "--top-k", "1")
        assert "snapshot 1" in done.stderr
        end = time.monotonic() + SECONDS
        while drawing() and time.monotonic() < end:
            time.sleep(0.05)
        assert not drawing()
    finally:
        gc.enable()
