"""Options whose values are the names of entries, such as policies or formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

from ep_rebalance.formats import FORMATS


def one_of(names: Iterable[str]) -> dict[str, Any]:
    """Arguments of `typer.Option` for a text that must be one of these names."""
    known = tuple(names)

    def parse(text: str) -> str:
        if text not in known:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, known))}.")
        return text

    return {
        "parser": parse,
        "metavar": f"[{'|'.join(known)}]",
        "autocompletion": lambda: list(known),
    }


TARGETS = one_of(name for name, one in FORMATS.items() if one.writes_placement)
"""Arguments of an option that says which engine is to read a placement."""
