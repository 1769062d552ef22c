"""Compilation to machine code: the one module that knows numba.

It imports numba, which takes most of a second, when the first compiled function is called.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_LOCK = threading.RLock()


def compiled(function: Function) -> Function:
    """Compile a function at its first call with new argument types. It then runs without the interpreter
    lock.

    The machine code is cached on disk, or only in memory if no folder can be written.
    """
    return cast("Function", Compiled(function))


class Compiled:
    """A function, for numba its dispatcher: compiled functions call each other without the interpreter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._dispatcher: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return (self._dispatcher or self.dispatcher)(*arguments)

    @property
    def dispatcher(self) -> Any:
        """Numba's."""
        with _LOCK:  # two of one function would compile it twice
            if self._dispatcher is None:
                self._dispatcher = _dispatcher(self._function)
            return self._dispatcher


def _dispatcher(function: Callable[..., Any]) -> Any:
    numba = _numba()
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba's, if it finds no folder for its cache
        return numba.njit(nogil=True)(function)


def cache_folder(function: Callable[..., Any]) -> Path | None:
    """Where numba keeps the code of a compiled function; None if it keeps none, as it found no folder that
    it can write to.
    """
    assert isinstance(function, Compiled)
    stats = getattr(function.dispatcher, "stats", None)  # with NUMBA_DISABLE_JIT there are none
    return Path(stats.cache_path) if stats and stats.cache_path else None


@functools.cache
def _numba() -> ModuleType:
    """The package, which knows what a `Compiled` is."""
    # In a checkout it lies outside of this folder.
    shared = find_spec("ep_rebalance.kernels.shared_arithmetic")
    assert shared is not None
    assert shared.origin is not None
    _drop_stale_code(Path(__file__).parent, Path(shared.origin))
    import numba
    from numba.extending import typeof_impl

    typeof_impl.register(Compiled, lambda value, _: numba.types.Dispatcher(value.dispatcher))
    return cast("ModuleType", numba)


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
