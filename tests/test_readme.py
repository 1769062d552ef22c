"""Parts of the README that are made from the code."""

from pathlib import Path

from ep_rebalance.cli import metric_table

README = Path(__file__).resolve().parent.parent / "README.md"


def test_metric_table_is_that_of_the_code():
    """`ep-rebalance metrics` prints it."""
    text = README.read_text(encoding="utf-8")
    table = text.partition("<!-- metrics -->")[2].partition("<!-- /metrics -->")[0]
    assert table.strip() == metric_table()


def test_line_count_is_honest():
    """README rounds to hundreds."""
    folders = ("ep_rebalance", "kernels")
    offline = {"offline", "formats", "diagnosis", "commands"}
    files = [
        file
        for folder in folders
        for file in (README.parent / folder).rglob("*.py")
        if not offline & set(file.parts)
    ]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    stated = README.read_text(encoding="utf-8").partition("<!-- lines -->")[2].partition("<!--")[0]
    assert abs(int(stated.replace(",", "")) - lines) <= 100
