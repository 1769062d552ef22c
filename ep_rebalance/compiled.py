"""Compilation to machine code: the one module that knows numba."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function at its first call with new argument types. It then runs without the interpreter
    lock.

    The machine code is cached on disk, or only in memory if no folder can be written.
    """
    try:
        return cast("Function", numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # numba's, if it finds no folder for its cache
        return cast("Function", numba.njit(nogil=True)(function))


def _drop_stale_code(folder: Path, constants: Path) -> None:
    """Delete cached code in a folder that is older than any file with compiled functions, or than
    `constants`, which holds numbers that they take from elsewhere.

    Numba compiles callees and constants from other files into a function, but looks only at the function's
    own file to see whether its cached code is still valid.
    """
    with suppress(OSError):
        texts = ((path, path.read_text(encoding="utf-8")) for path in folder.rglob("*.py"))
        sources = [constants, *(path for path, text in texts if "@compiled" in text)]
        newest = max(path.stat().st_mtime for path in sources)
        for index in folder.rglob("__pycache__/*.nbi"):
            if index.stat().st_mtime < newest:
                index.unlink()


# In a checkout it lies outside of this folder.
_shared = find_spec("ep_rebalance.kernels.shared_arithmetic")
assert _shared is not None
assert _shared.origin is not None
_drop_stale_code(Path(__file__).parent, Path(_shared.origin))
