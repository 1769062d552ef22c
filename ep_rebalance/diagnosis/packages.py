"""This package's entry points, and what it builds on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

from ep_rebalance.compiled import cache_folder
from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.planning.incremental.descent import improve_layer
from ep_rebalance.planning.policies import compile_planner
from ep_rebalance.version import __version__, source_digest

_ENTRY_POINTS = ("vllm.general_plugins", "vllm.endpoint_plugins")
_NEEDED = ("torch", "numba", "numpy", "pydantic", "msgspec", "prometheus_client")
_OPTIONAL = {"triton": "kernels on GPU", "plotly": "replay --report"}


def checks() -> list[tuple[str, Check]]:
    """(name, check) pairs."""
    return [("ep-rebalance", plugin), ("packages", packages), ("planner", planner)]


def plugin() -> Finding:
    """Whether the plugin has its entry points, without which vLLM does not find it."""
    missing = [
        group for group in _ENTRY_POINTS if "ep_rebalance" not in entry_points(group=group).names
    ]
    if missing:
        return Finding(
            check="ep-rebalance",
            verdict="problem",
            found=f"{__version__}, without entry points in {', '.join(missing)}",
            remedy="install it with pip in the environment that has vLLM; a copied folder will not do",
        )
    return Finding(
        check="ep-rebalance",
        verdict="ok",
        found=f"{__version__}, sources {source_digest()}, {len(_ENTRY_POINTS)} entry points",
    )


def packages() -> Iterator[Finding]:
    """Which packages are installed. Only those that are always needed are a problem if they are missing."""
    found = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    missing = [name for name in _NEEDED if found[name] is None]
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        yield Finding(
            check="packages", verdict="problem", found=f"no {', '.join(missing)}", remedy=remedy
        )
    yield Finding(check="packages", verdict="ok", found=there)
    for name, use in _OPTIONAL.items():
        if found[name] is None:
            yield Finding(check=name, verdict="skipped", found=f"not installed; for {use}")


def planner() -> Finding:
    """Compiles the planner. Once on each machine suffices, if numba can keep the code in its cache."""
    began = time.perf_counter()
    compile_planner()
    seconds = time.perf_counter() - began
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return Finding(
            check="planner",
            verdict="problem",
            found="not compiled: NUMBA_DISABLE_JIT is set",
            remedy="unset NUMBA_DISABLE_JIT; a plan would take minutes",
        )
    if cache_folder(improve_layer) is None:
        return Finding(
            check="planner",
            verdict="warning",
            found=f"compiled in {seconds:.1f} s, and numba has no folder to keep the code in",
            remedy="set NUMBA_CACHE_DIR to a folder that the server may write",
        )
    return Finding(check="planner", verdict="ok", found=f"compiled in {seconds:.1f} s, code kept")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
