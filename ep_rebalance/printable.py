"""Texts from elsewhere as they may be shown: they command no terminal."""

from __future__ import annotations

from typing import Any


def printable(value: Any) -> Any:
    """The same lists, mappings and texts, with those characters spelt out that are none to be shown.

    They could command a terminal, or be half of one and fail when they are written. Raises RecursionError.
    """
    if isinstance(value, str):
        return value if value.isprintable() else "".join(map(_spelt, value))
    if isinstance(value, list):
        return [printable(one) for one in value]
    if isinstance(value, dict):
        return {printable(key): printable(held) for key, held in value.items()}
    return value


def _spelt(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode()
