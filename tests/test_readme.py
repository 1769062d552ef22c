"""Parts of the documents that are made from the code."""

from pathlib import Path

from ep_rebalance.commands.reference import kernel_table, metric_table

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
OPERATIONS = ROOT / "docs" / "operations.md"
QUANTISATION = ROOT / "docs" / "quantisation.md"


def test_metric_table_is_that_of_the_code():
    """`ep-rebalance metrics` prints it."""
    text = OPERATIONS.read_text(encoding="utf-8")
    table = text.partition("<!-- metrics -->")[2].partition("<!-- /metrics -->")[0]
    assert table.strip() == metric_table()


def test_table_of_kernels_is_that_of_the_code():
    """`ep-rebalance kernels` prints it."""
    text = QUANTISATION.read_text(encoding="utf-8")
    table = text.partition("<!-- pairs -->")[2].partition("<!-- /pairs -->")[0]
    assert table.strip() == kernel_table()


def test_line_count_is_honest():
    """The text rounds to hundreds."""
    folders = ("ep_rebalance", "kernels")
    offline = {"offline", "formats", "diagnosis", "commands"}
    files = [
        file
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if not offline & set(file.parts)
    ]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    text = ARCHITECTURE.read_text(encoding="utf-8")
    stated = text.partition("<!-- lines -->")[2].partition("<!--")[0]
    assert abs(int(stated.replace(",", "")) - lines) <= 100
