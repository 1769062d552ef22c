"""Wraps a method of vLLM; most seams do so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Around = Callable[..., Any]
"""Called with the original function first, then with the caller's arguments."""


def wrap(owner: type[Any], name: str, around: Around) -> None:
    """Replace a method of `owner` by `around`, if `owner` itself defines it.

    Does nothing for an inherited method, which is wrapped where it is defined: wrapped in both
    classes, it would run `around` twice.
    """
    original = owner.__dict__.get(name)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)
