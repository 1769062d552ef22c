"""The release, as pyproject.toml has it, and what tells two installations of it apart."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_ELSEWHERE = ("dashboards", "kernels")
"""Packages whose sources lie at the root of the repository until they are installed."""
_OF_SERVERS = ("ep_rebalance", "ep_rebalance.kernels")


@cache
def source_digest() -> str:
    """Twelve hexadecimal digits of the plugin's source files, their names and contents, wherever they lie.

    Read once, some 10 ms. Equal for a checkout and for what was installed from it.
    """
    digest = hashlib.sha256()
    for package in _OF_SERVERS:
        for name, path in sorted(_sources(package).items()):
            digest.update(f"{package}/{name}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _sources(package: str) -> dict[str, Path]:
    """By name within the package, without those of packages that may lie elsewhere."""
    spec = find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return {
        path.relative_to(folder).as_posix(): path
        for folder in map(Path, folders)
        for path in folder.rglob("*.py")
        if path.relative_to(folder).parts[0] not in _ELSEWHERE
    }
