"""A part of a document that a program writes, between two marks: `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MarkedPart:
    """Of one name in a document; the first mark is a line of its own."""

    document: Path
    name: str

    def text(self) -> str:
        """As it stands there."""
        _, text, _ = self._split()
        return text

    def write(self, text: str) -> None:
        """Put this text in its place."""
        before, _, after = self._split()
        self.document.write_text(f"{before}{text}{after}", encoding="utf-8")

    def _split(self) -> tuple[str, str, str]:
        """What is before the part, the marks included, the part, and what is behind it."""
        begin, end = f"<!-- {self.name} -->\n", f"<!-- /{self.name} -->"
        before, found, rest = self.document.read_text(encoding="utf-8").partition(begin)
        text, ended, after = rest.partition(end)
        assert found, f"{self.document} has no {begin!r}"
        assert ended, f"{self.document} has no {end!r}"
        return before + begin, text, end + after


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
