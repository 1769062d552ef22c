"""docs/reliability.md's table, from what the last runs of the campaign saw (docs/reliability.json).

PYTHONPATH=tests/support python tests/faults/faults_table.py     writes the table anew
"""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from marked_part import MarkedPart, table_row

if TYPE_CHECKING:
    from fault import Fault

DOCS = Path(__file__).parents[2] / "docs"
SEEN = DOCS / "reliability.json"
PART = MarkedPart(DOCS / "reliability.md", "faults")
HEAD = ("fault", "ranks", "promised", "seen", "when", "vLLM", "seeds")

WRITES = "FAULTS_TABLE"
"""An environment variable: runs write what they see into the table only if it is set, as by `scripts/test
faults`.
"""


def record(fault: Fault, seen: str, seed: int) -> None:
    """Take up what was seen, in place of what an earlier run saw of the same fault; the seeds of both stand
    there.
    """
    if not os.environ.get(WRITES):
        return
    row = {
        "fault": fault.name,
        "ranks": fault.layout.name,
        "promised": fault.promise,
        "seen": seen,
        "when": date.today().isoformat(),
        "vllm": vllm.__version__,
    }
    of_it = [r for r in _rows() if all(r[name] == row[name] for name in ("fault", "ranks"))]
    seeds = {seed, *(s for r in of_it if r["vllm"] == row["vllm"] for s in r["seeds"])}
    rows = [r for r in _rows() if r not in of_it] + [row | {"seeds": sorted(seeds)}]
    SEEN.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    write()


def table() -> str:
    """Between the marks of the page."""
    lines = [table_row(HEAD), table_row(["---"] * len(HEAD))]
    lines += [table_row([_cell(value) for value in row.values()]) for row in _rows()]
    return "\n".join(lines)


def _cell(value: str | list[int]) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else value
    return text.replace("|", "/")


def write() -> None:
    """The page, with the table of now."""
    PART.write(f"\n{table()}\n\n")


def _rows() -> list[dict[str, Any]]:
    return json.loads(SEEN.read_text()) if SEEN.exists() else []


if __name__ == "__main__":
    write()
