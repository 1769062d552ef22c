"""Output: a result as a table for a terminal, Markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ep_rebalance.printable import printable


def console(
    *, file: IO[str] | None = None, width: int | None = None, stderr: bool = False
) -> Console:
    """A console that shows texts as they are: what a file holds is no markup."""
    return Console(file=file, width=width, stderr=stderr, markup=False, emoji=False)


def say(line: str) -> None:
    """A line on stderr, which commands no terminal: it may hold names of files, or texts in them."""
    typer.echo(printable(line), err=True)


class Format(StrEnum):
    """Format of the output."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A result, as every format shows it.

    result: all of it, JSON-ready.
    sentences: what is read first.
    command: for a shell, below them; "" if there is none.
    titles: of the columns; those in `texts` hold texts, the others numbers.
    cells: rows of as many cells as there are titles.
    groups: how many rows belong together.
    caption: how to read the columns.
    lines: what CSV holds, a mapping for each line with the same keys.
    """

    result: dict[str, Any]
    title: str
    sentences: Sequence[str]
    command: str = ""
    titles: Sequence[str]
    texts: Sequence[str]
    cells: Sequence[Sequence[str]]
    groups: int = 1
    caption: str
    lines: Sequence[dict[str, Any]]


def write(shown: Shown, format_: Format | None, output: Path | None) -> None:
    """Write a result to a file, or to stdout if `output` is None.

    format_: by default a table if stdout is a terminal, else JSON.
    """
    chosen = format_ or (Format.TABLE if sys.stdout.isatty() else Format.JSON)
    shown = _spelt_out(shown)
    with open(output, "w", encoding="utf-8") if output else _stdout() as file:
        match chosen:
            case Format.TABLE:
                _print(shown, console(file=file, width=120 if output else None))
            case Format.MARKDOWN:
                file.write(_markdown(shown))
            case Format.JSON:
                file.write(json.dumps(shown.result, indent=2) + "\n")
            case Format.CSV:
                file.write(_csv(shown.lines))


def _spelt_out(shown: Shown) -> Shown:
    """Without what commands a terminal, as names of files may; the result itself is for JSON."""
    return replace(
        shown,
        sentences=[printable(sentence) for sentence in shown.sentences],
        command=printable(shown.command),
        cells=[[" ".join(printable(cell).split("\n")) for cell in row] for row in shown.cells],
        caption=printable(shown.caption),
    )


@contextmanager
def _stdout() -> Iterator[IO[str]]:
    yield sys.stdout


def _print(shown: Shown, to: Console) -> None:
    for sentence in shown.sentences:
        to.print(Text(sentence), highlight=False)
    if shown.command:
        to.print(Text(f"\n{shown.command}"), highlight=False, soft_wrap=True)
    table = Table(title=shown.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in shown.titles:
        table.add_column(title, justify="left" if title in shown.texts else "right", no_wrap=True)
    for number, row in enumerate(shown.cells, 1):
        table.add_row(*map(Text, row), end_section=shown.groups > 1 and not number % shown.groups)
    to.print(table)
    to.print(Text(shown.caption), style="dim", highlight=False)


_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_MARKS = re.compile(r"([\\*_\[\]<>|#~])")


def _markdown(shown: Shown) -> str:
    """As GitHub reads it."""
    parts = [_escaped(sentence) for sentence in shown.sentences]
    if shown.command:
        parts.append(f"```\n{shown.command}\n```")
    rule = ["---" if title in shown.texts else "---:" for title in shown.titles]
    rows = [map(_escaped, shown.titles), rule, *(map(_escaped, row) for row in shown.cells)]
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    parts.append(_escaped(shown.caption))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is, in a line. Between backticks it does so anyway."""
    text = text.replace("\n", " ")
    parts = text.split("`")
    if len(parts) % 2 == 0 or "``" in text:  # a backtick without a partner
        return _MARKS.sub(r"\\\1", text).replace("`", "\\`")
    parts[::2] = [_MARKS.sub(r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows({name: _no_formula(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    """A value that a spreadsheet does not compute: with a quote ahead of a text that it would."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value
