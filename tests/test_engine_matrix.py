"""docs/engines.md says which test runs on which engine; the marks of the tests say so too."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = ("engine_032", "engine_033_v1", "engine_033_v2")
COLLECT = """
import sys, pytest
class Marks:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("test:", item.originalname, *(mark.name for mark in item.iter_markers()))
sys.exit(pytest.main(["--collect-only", "-q", "-m", "server", "tests/server"], [Marks()]))
"""


def marked() -> dict[tuple[str, str], tuple[bool, bool]]:
    """(test, engine) -> whether it runs there only as one that repeats, and whether it needs hosts."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[tuple[str, str], tuple[bool, bool]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("test: "):
            name, *marks = line.removeprefix("test: ").split()
            (engine,) = set(marks) & set(COLUMNS)
            repeats, _ = found.get((name, engine), (True, False))
            again = bool({"repeats", "models"} & set(marks))
            found[name, engine] = (repeats and again, "hosts" in marks)
    return found


def documented() -> dict[tuple[str, str], tuple[bool, bool]]:
    found = {}
    for line in (ROOT / "docs" / "engines.md").read_text().splitlines():
        if re.match(r"\| `test_\w+` \|", line):
            name, *cells, why = (cell.strip() for cell in line.strip("|").split("|"))
            assert why, name
            for engine, cell in zip(COLUMNS, cells, strict=True):
                if cell:
                    found[name.strip("`"), engine] = ("again" in cell, "hosts" in cell)
    return found


def test_the_table_of_engines_is_that_of_the_marks():
    assert documented() == marked()
