"""docs/models.md's table, from what the last runs of tests/server/test_models.py saw (docs/models.json).

python tests/support/models_table.py     writes the table anew
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marked_part import MarkedPart, table_row
from moe_families import BY_NAME, FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
SEEN = DOCS / "models.json"
PART = MarkedPart(DOCS / "models.md", "models")
HEAD = (
    "family",
    "vLLM's class",
    "released models, for example",
    "vLLM",
    "layers with experts",
    "counted",
    "migrations",
    "answers",
)

WRITES = "MODELS_TABLE"
"""An environment variable: tests write what they see into the table only if it is set, as by `scripts/test
models`, since other runs should leave the checkout as it is.
"""


def record(seen: Mapping[str, Any]) -> None:
    """Take up what one run saw of a family on an engine, in place of what an earlier one saw."""
    rows = [
        row for row in _rows() if (row["family"], row["vllm"]) != (seen["family"], seen["vllm"])
    ]
    rows.append(dict(seen))
    order = list(BY_NAME)
    rows.sort(key=lambda row: (order.index(row["family"]), row["vllm"]))
    SEEN.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    write()


def table() -> str:
    """Between the marks of the page. A family that was never run has a row that says so."""
    lines = [table_row(HEAD), table_row(["---"] * len(HEAD))]
    for family in FAMILIES:
        rows = [row for row in _rows() if row["family"] == family.name]
        for row in rows or [{}]:
            head = (f"`{family.name}`", f"`{row['class']}`" if row else "", family.examples)
            lines.append(table_row([*head, *_cells(row)]))
    return "\n".join(lines)


def write() -> None:
    """The page, with the table of now."""
    PART.write(f"\n{table()}\n\n")


def _rows() -> list[dict[str, Any]]:
    return json.loads(SEEN.read_text()) if SEEN.exists() else []


def _cells(row: Mapping[str, Any]) -> list[str]:
    if not row:
        return ["not run", "", "", "", ""]
    if row["reason"]:
        whose = "vLLM alone ends likewise" if row["engine_alone"] else "with the plugin only"
        return [row["vllm"], "", "", "", f"does not start ({whose}): {row['reason']}"]
    numbers = ", ".join(map(str, row["layers"]))
    counted = f"{row['tokens']} tokens x {row['top_k']} in each"
    moved = f"{row['migrations']}, {row['moved']} experts"
    answers = f"{row['answers']} equal across them"
    if row.get("alone_by_batch"):
        answers += "; vLLM's own, without the plugin, depend on the batch"
    elif row["alone"]:
        answers += f", {row['alone']} to those of one rank without the plugin"
    return [row["vllm"], f"{numbers} of {row['of']}", counted, moved, answers]


if __name__ == "__main__":
    write()
