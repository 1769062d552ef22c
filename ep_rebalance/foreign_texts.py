"""Texts and JSON from elsewhere: nested no deeper than can be read, and commanding no terminal."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

Kind = TypeVar("Kind")


def decoded(data: bytes, kind: type[Kind]) -> Kind:
    """What JSON holds, with its texts as `printable` has them.

    Raises msgspec.DecodeError, of which msgspec.ValidationError is one, and UnicodeDecodeError; both are
    ValueErrors.
    """
    try:
        return msgspec.convert(printable(msgspec.json.decode(data)), kind)
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None


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
