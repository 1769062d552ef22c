"""Unpack a load into the folder that PYTHONPATH names first in the other steps."""

import argparse
import compileall
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_kit.archive import SUFFIX, unpack
from gpu_kit.figures import not_here, tell
from gpu_kit.places import LOADS, STAMP


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("load")
    parser.add_argument("--loads", type=Path, default=LOADS)
    parser.add_argument("--site", type=Path, required=True)
    options = parser.parse_args()
    packed, stamp = options.loads / options.load, options.site / f"{options.load}.{STAMP}"
    if not (packed / STAMP).exists():
        not_here(f"there is no {packed}")
    if stamp.exists() and stamp.read_text() == (packed / STAMP).read_text():
        tell(unpacked="before")
        return 0
    tell(**unpack_load(packed, options.site))
    shutil.copy(packed / STAMP, stamp)
    return 0


def unpack_load(packed: Path, site: Path) -> dict[str, int]:
    """Archives and wheels; how many of each. Raises CalledProcessError if a wheel cannot be installed."""
    archives, wheels = sorted(packed.glob(f"*{SUFFIX}")), sorted(packed.glob("*.whl"))
    for archive in archives:
        unpack(archive, site)
    if wheels:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        install += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        subprocess.run([*install, *map(str, wheels)], check=True)
    # vLLM imports itself in several processes at once: each would compile all that it imports.
    compileall.compile_dir(site, quiet=2, workers=0)
    return {"archives": len(archives), "wheels": len(wheels)}


if __name__ == "__main__":
    sys.exit(main())
