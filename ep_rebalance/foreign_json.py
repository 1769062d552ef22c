"""JSON from elsewhere: nested no deeper than can be read, and with no text that commands a terminal."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from ep_rebalance.printable import printable

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
