"""How a seam puts itself around a method of vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Around = Callable[..., Any]
"""Called with the original function, then with what it is called with."""


def wrap(owner: type[Any], name: str, around: Around) -> None:
    """Put `around` in the place of a method that `owner` itself defines; inherited ones are wrapped
    where they are defined.
    """
    original = owner.__dict__.get(name)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)
