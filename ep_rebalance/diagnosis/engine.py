"""What the installed vLLM says, asked of the adapter for it, and kept as long as nothing changes.

Importing vLLM takes some ten seconds. An answer is kept in a file, under a digest of all that it depends on:
every file of vLLM (size and time of its last change), our sources, the packages that are installed, the
settings in the environment and the accelerators. Only answers without a problem are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_rebalance.checkpoint import Checkpoint
from ep_rebalance.version import __version__, source_digest

_ADAPTER = "ep_rebalance.engines.vllm.diagnosis"
_SETTINGS = ("VLLM_", "CUDA_", "ROCR_", "HIP_", "NVIDIA_")
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dri/render*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What vLLM says.

    value: JSON-ready.
    kept_since: Unix time at which it was asked, if not now.
    """

    value: Any
    kept_since: float | None = None


@dataclass(frozen=True)
class Engine:
    """The installed vLLM.

    fresh: whether to ask anew although an answer is kept.
    """

    fresh: bool = False

    @property
    def installed(self) -> bool:
        return find_spec("vllm") is not None

    def findings(self) -> Answer:
        """Of `checks` in the adapter: one mapping for each finding."""
        return self._ask("findings", (), keep=_all_ok)

    def numbers(self, checkpoint: Checkpoint) -> Answer:
        """What vLLM reads in a configuration: see `numbers_as_served` in the adapter."""
        config = json.dumps([checkpoint.config, checkpoint.quantisation])
        arguments = (str(checkpoint.folder),)
        return self._ask("numbers_as_served", arguments, about=config, keep=lambda _: True)

    def architecture(self, names: Sequence[str]) -> Answer:
        """Of `architecture` in the adapter: a finding as a mapping."""
        return self._ask("architecture_finding", (list(names),), keep=lambda one: _all_ok([one]))

    def _ask(
        self, question: str, arguments: Sequence[Any], *, keep: Any, about: str = ""
    ) -> Answer:
        file = self._file(question, json.dumps(arguments) + about)
        if not self.fresh and (held := _read(file)):
            return Answer(value=held["value"], kept_since=held["asked"])
        # By name: engines are a layer above this one, which may not import them.
        adapter: Any = import_module(_ADAPTER)
        value = getattr(adapter, question)(*arguments)
        if keep(value):
            _write(file, {"asked": time.time(), "value": value})
        return Answer(value=value)

    def _file(self, question: str, about: str) -> Path:
        digest = hashlib.sha256(f"{self._state}\0{question}\0{about}".encode()).hexdigest()
        return _folder() / f"{digest[:32]}.json"

    @cached_property
    def _state(self) -> str:
        """A digest of what answers depend on."""
        parts: list[str] = [__version__, source_digest(), sys.version, sys.platform]
        parts += sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_SETTINGS))
        parts += [device for pattern in _DEVICES for device in sorted(glob(pattern))]
        for folder in sys.path:
            parts += sorted(path.name for path in Path(folder or ".").glob("*.dist-info"))
        spec = find_spec("vllm")
        for folder in (spec and spec.submodule_search_locations) or ():
            parts += sorted(_files(folder))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _files(folder: str) -> Iterator[str]:
    """Path, size and time of each source and library in a folder."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            if name.endswith((".py", ".so")):
                found = os.stat(os.path.join(root, name))
                yield f"{root}/{name} {found.st_size} {found.st_mtime_ns}"


def _all_ok(findings: Sequence[Mapping[str, Any]]) -> bool:
    return all(one["verdict"] == "ok" for one in findings)


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ep_rebalance" / "doctor"


def _read(file: Path) -> dict[str, Any] | None:
    """None if there is none, or one that cannot be read: then vLLM is asked."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(held, dict) and isinstance(held.get("asked"), float) and "value" in held
    return held if whole else None


def _write(file: Path, answer: Mapping[str, Any]) -> None:
    """Where no file can be written, nothing is kept."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(answer), encoding="utf-8")
        part.replace(file)
