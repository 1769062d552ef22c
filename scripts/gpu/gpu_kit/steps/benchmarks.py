"""benchmarks/kernels.py; on device cpu every case once, interpreted, to see that it runs."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_kit.figures import tell
from gpu_kit.places import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    folder = ROOT / "benchmarks"
    rehearsal = ["--rehearse", "--tokens", "3"] if options.device == "cpu" else []
    done = subprocess.run(
        [sys.executable, str(folder / "kernels.py"), "--json", str(options.json), *rehearsal],
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    if done.returncode == 0:
        result = json.loads(options.json.read_text())
        tell(cases=len(result["results"]), device=result["device"], file=options.json.name)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
