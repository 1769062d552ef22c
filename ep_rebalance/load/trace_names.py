"""Names of trace files: `NAME-NUMBER.eptrace`. Beside `trace/`, for texts that need no reader of them."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIX = ".eptrace"


def file_name(name: str, number: int) -> str:
    """The name that a writer of `name` gives its file of a number."""
    return f"{name}-{number:06d}{SUFFIX}"


def number_of(path: Path, name: str) -> int | None:
    """The number of a file that a writer of `name` began; None for other files."""
    found = re.fullmatch(re.escape(name) + "-([0-9]{6,18})" + re.escape(SUFFIX), path.name)
    number = 0 if found is None else int(found[1])
    return number if path.name == file_name(name, number) else None


def place_in_sequence(path: Path) -> tuple[tuple[Path, str], int]:
    """(what all files of one sequence have in common, the number of this one among them).

    A file without a number is alone. Fewer digits will do, since people rename files.
    """
    found = re.fullmatch("(.*?)([0-9]{1,18})", path.stem)
    folder = path.absolute().parent
    return ((folder, path.name), 0) if found is None else ((folder, found[1]), int(found[2]))
