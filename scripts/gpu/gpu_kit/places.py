"""Where things are."""

from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
ROOT = KIT.parents[1]
LOADS = ROOT / ".gpu"
STAMP = "load.json"
"""In the folder of a load, and behind the load's name where it was unpacked: what it was packed from."""
