"""benchmarks/kernels.py: the cases that the time allows, few tokens to many; on device cpu every case once,
interpreted, to see that it runs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_kit.figures import tell
from gpu_kit.places import ROOT

TOKENS = ("1", "64", "1024", "8192")
SECONDS_FOR_THE_LAST_CASE = 30.0
"""Whose kernels may have to be compiled."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of this step")
    options = parser.parse_args()
    folder = ROOT / "benchmarks"
    on_cpu = options.device == "cpu"
    limits = ["--rehearse", "--tokens", "3"] if on_cpu else ["--tokens", *TOKENS, "--turns", "20"]
    limits += ["--seconds", str(options.seconds - SECONDS_FOR_THE_LAST_CASE)]
    done = subprocess.run(
        [sys.executable, str(folder / "kernels.py"), "--json", str(options.json), *limits],
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    if done.returncode == 0:
        result = json.loads(options.json.read_text())
        tell(cases=len(result["results"]), device=result["device"], file=options.json.name)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
